from __future__ import annotations

import builtins
import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from control.callbacks import EarlyStopping, MetricsFiles, Progress, TensorBoard, configured
from control.config import RunConfig
from control.events import CallbackError, CallbackRegistry, Event
from control.run_state import RunState
from spheres.errors import ConfigError


class FakeRun:
    """A run of which the test says how far it is."""

    run_id, state, epoch, total_steps, living_spheres = "r-1", RunState.RUNNING, 0, 100, 5

    def __init__(self, run_dir: Path, *, step: int = 0, **config: Any) -> None:
        self.run_dir, self.step = run_dir, step
        self.config = RunConfig(spheres=6, **config)
        self.metrics: Mapping[str, float] = {}
        self.stopped: list[str] = []

    def request_stop(self, reason: str) -> None:
        self.stopped.append(reason)

    def request_checkpoint(self) -> None: ...


def step_record(step: int, *, loss: float = 0.5, accuracy: float = 0.75) -> dict[str, Any]:
    return {
        "event": "step", "step": step, "epoch": step // 10, "term": 1, "weights_version": step + 1,
        "samples": 64 * (step + 1), "batch_samples": 64, "loss": loss, "metrics": {"accuracy": accuracy},
        "learning_rate": 0.1,
        "gradient": {"norm": 1.5, "min": -1.0, "max": 1.0, "mean": 0.0, "variance": 0.1, "clipped": False},
        "weights": {"norm": 9.0, "min": -1.0, "max": 1.0, "mean": 0.0, "variance": 0.1},
        "seconds": {"step": 0.01, "optimizer": 0.001, "journal": 0.001},
        "bytes_up": 1000, "bytes_down": 3000, "sync_fraction": 0.4, "spheres": 5, "replayed": False,
    }  # fmt: skip


def evaluation(step: int, accuracy: float, loss: float = 0.3) -> Event:
    record = {"event": "evaluation", "step": step, "loss": loss, "metrics": {"accuracy": accuracy}, "best": True}
    return Event("evaluation", step, 0, record)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def train(
    registry: CallbackRegistry, run: FakeRun, steps: range, clock: Clock | None = None, seconds: float = 0.01
) -> None:
    """Emit what a controller would."""
    registry.emit(Event("train_start", run.step, 0), run)
    for step in steps:
        if clock is not None:
            clock.now += seconds
        run.step, run.epoch = step + 1, step // 10
        registry.emit(Event("batch_end", step, run.epoch, step_record(step)), run)
        if step % 10 == 9:
            registry.emit(Event("epoch_end", step, run.epoch), run)
    registry.emit(Event("train_end", run.step, 0), run)


# --- progress


def progress_lines(run: FakeRun, steps: range, seconds: float = 0.01) -> list[dict[str, Any]]:
    out, clock, registry = io.StringIO(), Clock(), CallbackRegistry(on_error="raise")
    registry.register(Progress(stream=out, clock=clock))
    train(registry, run, steps, clock, seconds)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_lines_are_json_where_the_output_is_no_terminal_and_at_most_ten_a_second(tmp_path: Path) -> None:
    lines = progress_lines(FakeRun(tmp_path), range(100))
    assert [line["event"] for line in (lines[0], lines[-1])] == ["train_start", "train_end"]
    steps = [line for line in lines if line["event"] == "step"]
    assert 9 <= len(steps) <= 12
    last = steps[-1]
    assert last["step"] == 100
    assert last["loss"] == pytest.approx(0.5)
    assert last["metrics"] == {"accuracy": pytest.approx(0.75)}
    assert last["samples_per_second"] == pytest.approx(6400, rel=0.01)
    assert last["bytes_per_second"] == pytest.approx(400_000, rel=0.01)
    assert (last["spheres"], last["known_spheres"]) == (5, 6)
    assert last["eta_seconds"] == 0
    assert steps[0]["eta_seconds"] == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(("every", "expected"), [("1steps", 100), ("25steps", 4), ("2epochs", 5), ("100ms", 9)])
def test_log_every_is_kept_to(tmp_path: Path, every: str, expected: int) -> None:
    lines = progress_lines(FakeRun(tmp_path, log_every=every), range(100))
    assert len([line for line in lines if line["event"] == "step"]) == expected + 1  # and one at the end


def test_other_events_are_always_printed_and_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    class GoneAfterOne(io.StringIO):
        def write(self, text: str) -> int:
            if self.getvalue():
                raise BrokenPipeError
            return super().write(text)

    out, registry = GoneAfterOne(), CallbackRegistry(on_error="raise")
    registry.register(Progress(stream=out))
    registry.emit(evaluation(3, 0.9), FakeRun(tmp_path))
    registry.emit(evaluation(4, 0.9), FakeRun(tmp_path))
    registry.emit(evaluation(5, 0.9), FakeRun(tmp_path))
    assert [json.loads(line)["step"] for line in out.getvalue().splitlines()] == [3]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [10, 20, 40, 80, 200])
def test_the_display_fits_any_terminal(tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    out, clock, registry = Terminal(), Clock(), CallbackRegistry(on_error="raise")
    run = FakeRun(tmp_path)
    registry.register(Progress(stream=out, clock=clock))
    train(registry, run, range(50), clock)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n")
    assert all(len(line) <= columns for line in text.splitlines()), text
    assert "step 50" in text
    if columns == 200:
        for shown in ("loss 0.5", "accuracy 75.00%", "spheres 5/6", "6,400 samples/s", "0.4 MB/s", "sync 40%", "ETA"):
            assert shown in text


def test_lost_spheres_and_evaluations_stay_above_the_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out, registry, run = Terminal(), CallbackRegistry(on_error="raise"), FakeRun(tmp_path)
    registry.register(Progress(stream=out))
    registry.emit(Event("train_start", 0, 0), run)
    registry.emit(Event("sphere_lost", 7, 0, {"event": "sphere_lost", "sphere": "s-3", "reason": "[gone]"}), run)
    registry.emit(evaluation(9, 0.5), run)
    registry.emit(Event("train_end", 9, 0), run)
    assert "step 7  sphere s-3 lost: [gone]" in out.getvalue()
    assert "step 9  evaluation: loss 0.3, accuracy 50.00%  (best)" in out.getvalue()


# --- early stopping


@pytest.mark.parametrize(
    ("direction", "values", "stops_after"),
    [
        ("max", [0.1, 0.2, 0.2, 0.1, 0.3], 4),
        ("max", [0.1, 0.2, 0.3, 0.4, 0.5], None),
        ("min", [0.5, 0.4, 0.4, 0.6], 4),
        ("max", [0.5, float("nan"), float("nan")], 3),
    ],
)
def test_early_stopping(tmp_path: Path, direction: Any, values: list[float], stops_after: int | None) -> None:
    callback, run = EarlyStopping(2, "accuracy", direction), FakeRun(tmp_path)
    for n, value in enumerate(values, 1):
        callback.on_evaluation(evaluation(n, value), run)
        assert bool(run.stopped) == (stops_after is not None and n >= stops_after), n
    if stops_after:
        assert "no better than" in run.stopped[0]


def test_early_stopping_goes_on_after_a_restore_where_it_was(tmp_path: Path) -> None:
    first, second, run = EarlyStopping(2, "loss", "min"), EarlyStopping(2, "loss", "min"), FakeRun(tmp_path)
    first.on_evaluation(evaluation(1, 0, loss=0.5), run)
    first.on_evaluation(evaluation(2, 0, loss=0.6), run)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.on_evaluation(evaluation(2, 0, loss=0.6), run)  # replayed: counts once
    assert not run.stopped
    second.on_evaluation(evaluation(3, 0, loss=0.55), run)
    assert run.stopped


def test_early_stopping_on_a_metric_that_is_not_there_says_which_are() -> None:
    with pytest.raises(ConfigError, match="no metric 'f1'; evaluations have loss, accuracy"):
        EarlyStopping(2, "f1").on_evaluation(evaluation(1, 0.5), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        EarlyStopping(0)


# --- files


def test_metrics_files_have_a_row_per_step_and_lose_what_a_restore_takes_back(tmp_path: Path) -> None:
    registry, run, callback = CallbackRegistry(on_error="raise"), FakeRun(tmp_path), MetricsFiles()
    registry.register(callback)
    registry.register(lambda event, run: callback.on_evaluation(evaluation(event.step + 1, 0.5), run), ["epoch_end"])
    train(registry, run, range(25))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("25,2,16")  # cut by a crash
    second = CallbackRegistry(on_error="raise")
    second.register(MetricsFiles())
    run = FakeRun(tmp_path, step=20)
    train(second, run, range(20, 30))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(30))
    assert rows[7]["gradient.norm"] == "1.5"
    assert rows[7]["metrics.accuracy"] == "0.75"
    kept = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [record["step"] for record in kept] == [10]


def rows(path: Path) -> list[tuple[int, float]]:
    with (path / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def evaluated(path: Path) -> list[tuple[int, float]]:
    lines = (path / "evaluations.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


def steps_of(run: FakeRun, registry: CallbackRegistry, steps: range, loss: float, *, every: int = 10) -> None:
    """Emit the steps with an evaluation of the weights before every tenth."""
    for step in steps:
        if step and step % every == 0:
            registry.emit(evaluation(step, 0.5, loss=loss), run)
        run.step = step + 1
        registry.emit(Event("batch_end", step, 0, step_record(step, loss=loss)), run)


@pytest.mark.parametrize("back_to", [0, 1, 12, 20, 24])
def test_a_restore_in_mid_run_leaves_one_row_per_step(tmp_path: Path, back_to: int) -> None:
    registry, run = CallbackRegistry(on_error="raise"), FakeRun(tmp_path)
    registry.register(MetricsFiles())
    registry.emit(Event("train_start", 0, 0), run)
    steps_of(run, registry, range(25), 0.5)
    assert evaluated(tmp_path) == [(10, 0.5), (20, 0.5)]
    steps_of(run, registry, range(back_to, back_to + 1), 0.25, every=100)
    # what the restore takes back is gone at once: nobody knows whether it comes again. What was evaluated before this
    # step stands.
    assert rows(tmp_path) == [(step, 0.5) for step in range(back_to)] + [(back_to, 0.25)]
    assert [step for step, _ in evaluated(tmp_path)] == [step for step in (10, 20) if step <= back_to]
    steps_of(run, registry, range(back_to + 1, 31), 0.25)
    registry.emit(Event("train_end", 31, 0), run)
    assert rows(tmp_path) == [(step, 0.5 if step < back_to else 0.25) for step in range(31)]
    assert evaluated(tmp_path) == [(step, 0.5 if step <= back_to else 0.25) for step in (10, 20, 30)]


def test_an_evaluation_that_is_done_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    registry, run = CallbackRegistry(on_error="raise"), FakeRun(tmp_path)
    registry.register(MetricsFiles())
    registry.emit(Event("train_start", 0, 0), run)
    steps_of(run, registry, range(25), 0.5)
    steps_of(run, registry, range(20, 31), 0.25)
    registry.emit(Event("train_end", 31, 0), run)
    assert rows(tmp_path) == [(step, 0.5 if step < 20 else 0.25) for step in range(31)]
    assert evaluated(tmp_path) == [(10, 0.5), (20, 0.25), (30, 0.25)]


def test_a_restore_to_a_later_step_leaves_a_gap(tmp_path: Path) -> None:
    registry, run = CallbackRegistry(on_error="raise"), FakeRun(tmp_path)
    registry.register(MetricsFiles())
    registry.emit(Event("train_start", 0, 0), run)
    steps_of(run, registry, range(2), 0.5)
    steps_of(run, registry, range(7, 9), 0.5)
    assert [step for step, _ in rows(tmp_path)] == [0, 1, 7, 8]
    registry.emit(Event("train_end", 9, 0), run)


def test_rows_are_there_when_their_step_is_over(tmp_path: Path) -> None:
    registry, run = CallbackRegistry(on_error="raise"), FakeRun(tmp_path)
    registry.register(MetricsFiles())
    registry.emit(Event("train_start", 0, 0), run)
    for step in range(3):
        steps_of(run, registry, range(step, step + 1), 0.5, every=1)
        # nobody has closed or flushed: a kill costs nothing
        assert [row for row, _ in rows(tmp_path)] == list(range(step + 1))
        assert [row for row, _ in evaluated(tmp_path)] == list(range(1, step + 1))
    registry.emit(Event("train_end", 3, 0), run)


@pytest.mark.parametrize("first", [19, 20])  # a step comes first, or an evaluation
def test_a_callback_that_is_registered_in_mid_run_begins_there(tmp_path: Path, first: int) -> None:
    pytest.importorskip("tensorboardX")
    registry, run = CallbackRegistry(on_error="raise"), FakeRun(tmp_path)
    registry.register(MetricsFiles())
    registry.register(TensorBoard())
    steps_of(run, registry, range(first, 22), 0.5)
    registry.emit(Event("train_end", 22, 0), run)
    assert [step for step, _ in rows(tmp_path)] == list(range(first, 22))
    assert evaluated(tmp_path) == [(20, 0.5)]
    (found,) = scalars(tmp_path)
    assert [step for tag, step in found if tag == "train/loss"] == list(range(first, 22))


def test_lines_that_cannot_be_read_are_nobodys_and_stay(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text(
        'note by hand\n{"step": 1, "loss": 1}\n[]\n{"step": 9, "loss": 1}\n{"st'
    )
    registry, run = CallbackRegistry(on_error="raise"), FakeRun(tmp_path, step=5)
    registry.register(MetricsFiles())
    train(registry, run, range(5, 7))
    assert (tmp_path / "evaluations.jsonl").read_text() == 'note by hand\n{"step": 1, "loss": 1}\n[]\n'


def test_statistics_that_large_models_lack_are_left_empty(tmp_path: Path) -> None:
    registry, run = CallbackRegistry(on_error="raise"), FakeRun(tmp_path)
    registry.register(MetricsFiles())
    registry.emit(Event("train_start", 0, 0), run)
    registry.emit(Event("batch_end", 0, 0, without_statistics(0)), run)
    registry.emit(Event("train_end", 1, 0), run)
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["gradient.norm"], row["weights.norm"], row["loss"]) == ("1.5", "", "0.5")


def without_statistics(step: int) -> dict[str, Any]:
    return {**step_record(step), "gradient": {"norm": 1.5, "clipped": False}, "weights": {}}


# --- TensorBoard


def scalars(run_dir: Path) -> list[list[tuple[str, int]]]:
    """Return (tag, step) of the scalars of each file, the oldest first; ("start", step) where the viewer purges."""
    from tensorboardX.proto.event_pb2 import Event as BoardEvent

    files = []
    for path in sorted((run_dir / "tensorboard").iterdir(), key=lambda path: int(path.name.rpartition(".")[2])):
        data, at, found = path.read_bytes(), 0, []
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = BoardEvent.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            found += [(value.tag, event.step) for value in event.summary.value]
            if event.session_log.status:
                found.append(("start", event.step))
        files.append(found)
    return files


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    registry, run = CallbackRegistry(on_error="raise"), FakeRun(tmp_path)
    registry.register(TensorBoard())
    train(registry, run, range(3))
    ((start, *found),) = scalars(tmp_path)
    assert start == ("start", 0)
    assert [step for tag, step in found if tag == "train/loss"] == [0, 1, 2]
    for tag in ("train/accuracy", "train/learning_rate", "train/gradient/variance", "train/seconds/step"):
        assert (tag, 2) in found


def test_tensorboard_takes_records_without_statistics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    registry, run = CallbackRegistry(on_error="raise"), FakeRun(tmp_path)
    registry.register(TensorBoard())
    registry.emit(Event("train_start", 0, 0), run)
    registry.emit(Event("batch_end", 0, 0, step_record(0)), run)
    registry.emit(Event("batch_end", 1, 0, without_statistics(1)), run)
    registry.emit(Event("train_end", 2, 0), run)
    ((_, *found),) = scalars(tmp_path)
    by_step = {step: {tag for tag, at in found if at == step} for step in (0, 1)}
    missing = {"train/gradient/variance", "train/weights/variance", "train/weights/norm"}
    assert by_step[0] - by_step[1] == missing
    assert "train/gradient/norm" in by_step[1]


def test_tensorboard_purges_what_a_restore_takes_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    registry, run = CallbackRegistry(on_error="raise"), FakeRun(tmp_path)
    registry.register(TensorBoard())
    registry.emit(Event("train_start", 0, 0), run)
    steps_of(run, registry, range(5), 0.5)
    steps_of(run, registry, range(3, 6), 0.5)
    registry.emit(evaluation(4, 0.5), run)  # a restore to where an evaluation comes first
    steps_of(run, registry, range(4, 5), 0.5)
    registry.emit(Event("train_end", 5, 0), run)
    files = scalars(tmp_path)
    # within one second: a file of its own for each, or the later would take the place of the earlier
    assert [[step for tag, step in found if tag == "train/loss"] for found in files] == [
        [0, 1, 2, 3, 4],
        [3, 4, 5],
        [4],
    ]
    assert [found[0] for found in files] == [("start", 0), ("start", 3), ("start", 4)]
    assert [("evaluation/loss", 4) in found for found in files] == [False, False, True]


def test_tensorboard_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'armillary\[tensorboard\]'"):
        configured(RunConfig(tensorboard=True))


def test_the_configuration_says_which_callbacks_there_are() -> None:
    assert configured(RunConfig()) == []
    both = configured(RunConfig(early_stopping=3, metrics_csv=True, best_metric="loss", best_direction="min"))
    assert [type(callback) for callback in both] == [EarlyStopping, MetricsFiles]


# --- one callback's trouble is not the others'


class FullDisk(MetricsFiles):
    """A callback whose files can no longer be written."""

    def on_batch_end(self, event: Event, run: Any) -> None:
        raise OSError(28, "No space left on device")


def test_a_built_in_callback_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, registry, run = io.StringIO(), CallbackRegistry(), FakeRun(tmp_path)
    registry.register(FullDisk())
    registry.register(EarlyStopping(1, "accuracy", "max"))
    registry.register(Progress(stream=out))
    registry.register(lambda event, run: registry.emit(evaluation(event.step, 0.5), run), ["batch_end"])
    train(registry, run, range(3))
    assert registry.error_count == 3
    assert run.stopped
    told = [line for line in map(json.loads, out.getvalue().splitlines()) if line["event"] == "error"]
    assert [line["during"] for line in told] == ["batch_end"] * 3
    assert "FullDisk failed at batch_end: OSError: [Errno 28] No space left on device" in told[0]["error"]
    assert "Traceback" in caplog.text


def test_with_raise_the_first_of_several_failures_is_raised_after_all_were_called(tmp_path: Path) -> None:
    registry, run, called = CallbackRegistry(on_error="raise"), FakeRun(tmp_path), []

    def failing(name: str) -> Any:
        def callback(event: Event, run: Any) -> None:
            called.append(name)
            raise ValueError(name)

        return callback

    for name in ("first", "second"):
        registry.register(failing(name), ["train_end"])
    with pytest.raises(CallbackError, match="failed at train_end: ValueError: first"):
        registry.emit(Event("train_end", 0, 0), run)
    assert called == ["first", "second"]
    assert registry.error_count == 2


def test_who_is_registered_or_unregistered_by_a_callback_counts_from_the_next_event(tmp_path: Path) -> None:
    registry, run, heard = CallbackRegistry(on_error="raise"), FakeRun(tmp_path), []

    def first(event: Event, run: Any) -> None:
        heard.append("first")
        registry.unregister(last)
        if len(heard) < 3:
            registry.register(lambda event, run: heard.append("new"), ["epoch_end"])

    registry.register(first, ["epoch_end"])
    last = registry.register(lambda event, run: heard.append("last"), ["epoch_end"])
    registry.emit(Event("epoch_end", 9, 0), run)
    assert heard == ["first", "last"]
    registry.emit(Event("epoch_end", 19, 1), run)
    assert heard == ["first", "last", "first", "new"]


def test_progress_says_what_is_not_finite_and_its_means_leave_out_what_was_left_out() -> None:
    stream = io.StringIO()
    progress, run = Progress(json_lines=True, stream=stream, clock=lambda: 0.0), FakeRun(Path())
    progress.on_train_start(Event("train_start", 0, 0), run)
    whole = {**step_record(0, loss=0.5), "used_samples": 60}
    skipped = {**step_record(1), "loss": None, "metrics": {}, "used_samples": 0}
    for record in (whole, skipped):
        progress._totals.add(record)
    assert progress._totals.means()["loss"] == 0.5
    assert progress._totals.samples == whole["batch_samples"] + skipped["batch_samples"]
    for loud in (True, False):
        told = {"decision": "skipped_step", "reason": "microbatch 3 of s-2 is not finite", "loud": loud}
        progress.on_nonfinite(Event("nonfinite", 1, 0, told), run)
    assert stream.getvalue().count("microbatch 3 of s-2") == 1
