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
from control.events import CallbackRegistry, Event
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


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    registry, run = CallbackRegistry(on_error="raise"), FakeRun(tmp_path)
    registry.register(TensorBoard())
    train(registry, run, range(3))
    (written,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in written.read_bytes()


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
