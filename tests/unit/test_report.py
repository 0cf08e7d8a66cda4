from __future__ import annotations

import itertools
import json
import math
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.charts import Series, downsample, legend, line_chart, short, stacked_chart, ticks, tree_chart
from control.report import write_report
from spheres.errors import ConfigError

#: what must nowhere become markup
EVIL = """<script>alert("1")</script><img src=x onerror='a'>&amp;"""


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    record = {
        "event": "step", "step": step, "epoch": 0, "term": 1, "loss": 2.0 / (step + 1), "learning_rate": 0.1,
        "metrics": {"accuracy": 1 - 1 / (step + 2)}, "gradient": {"norm": 1.0 + step % 3, "clipped": False},
        "weights": {}, "batch_samples": 64, "seconds": {"step": 0.01, "gather": 0.008, "optimizer": 0.002},
        "phases": {name: {"sum": 0.006, "max": 0.004, "slowest": "s-1"} for name in ("compute", "wait", "send_up")},
        "spheres": 3, "sync_fraction": 0.4, "bytes_up": 10, "bytes_down": 10, "contributions": [[0, 4, "s-1"]],
    }  # fmt: skip
    return record | changes


def summary(**changes: Any) -> dict[str, Any]:
    spheres = [
        {"id": f"s-{n}", "parent": parent, "state": "active", "host": "h", "role": "leaf", "microbatches": 5,
         "samples": 320, "phase_seconds": {"compute": 0.5, "wait": 0.25, "send_up": 0.1}}
        for n, parent in ((1, "control"), (2, "control"), (3, "s-1"))
    ]  # fmt: skip
    found = {
        "state": "completed", "steps": 40, "epochs": 1, "samples": 2560, "loss": 0.05,
        "metrics": {"loss": 0.05, "accuracy": 0.9766, "train_accuracy": 0.5}, "weights_sha256": "ab" * 32,
        "wall_seconds": 12.5, "samples_per_second": 1234.5, "sync_fraction": 0.25, "spheres": spheres,
        "tree": {s["id"]: s["parent"] for s in spheres}, "run_id": "r-1", "reason": "", "error": None,
    }  # fmt: skip
    return found | changes


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data}|"

    @property
    def drawings(self) -> list[ET.Element]:
        return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]


def page(
    run_dir: Path,
    steps: list[dict[str, Any]],
    *,
    events: list[dict[str, Any]] | None = None,
    ended: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Page:
    (run_dir / "journal.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))
    (run_dir / "events.jsonl").write_text("".join(json.dumps(record) + "\n" for record in events or []))
    (run_dir / "run.json").write_text(json.dumps({"run_id": "r-1", "term": 1, "config": config or {}}))
    if ended is not None:
        (run_dir / "summary.json").write_text(json.dumps(ended))
    found = Page(write_report(run_dir))
    # nothing that runs, and nothing from elsewhere
    for tag, attributes in found.elements:
        assert tag not in {"script", "img", "link", "iframe", "object", "embed", "base", "form", "a", "use", "image"}
        assert not any(name.startswith("on") or name in {"href", "src", "xlink:href"} for name in attributes)
    assert not re.search(r"https?:|//|url\(|@import|javascript:", found.source)
    for drawing in found.drawings:
        assert not re.search(r"nan|inf", " ".join(n.get("points", "") + n.get("d", "") for n in drawing.iter()))
    assert {entry.name for entry in run_dir.iterdir()} <= {
        "journal.jsonl", "events.jsonl", "run.json", "summary.json", "report.html",
    }  # fmt: skip
    return found


def evaluation(step: int) -> dict[str, Any]:
    return {"event": "evaluation", "step": step, "loss": 0.3, "metrics": {"accuracy": 0.9}, "best": True}


def test_a_finished_run_is_shown_with_figures_charts_tree_and_spheres(tmp_path: Path) -> None:
    config = {"task": "digits", "optimizer": {"name": "sgd"}, "learning_rate": 0.1, "seed": 0}
    found = page(
        tmp_path, [step_record(n) for n in range(40)], events=[evaluation(20), evaluation(40)], ended=summary(),
        config=config,
    )  # fmt: skip
    for shown in ("Run r-1 |completed", "97.66 %|accuracy", "0.05|loss", "40|steps", "2,560|samples", "12.5|seconds",
                  "25 %|synchronising", "ab" * 32, "task |digits", "optimizer |sgd", "seed |0"):  # fmt: skip
        assert shown in found.text, shown
    titles = [
        "Loss", "Accuracy", "Where the time of a step goes, mean over the spheres", "Gradient norm", "Throughput",
        "Learning rate", "Tree", "Spheres",
    ]  # fmt: skip
    assert re.findall(r"<h2>(.*?)</h2>", found.source) == titles
    assert len(found.drawings) == 7
    assert "send up" in found.text
    assert "send_up" not in found.text
    labels = [drawing.get("aria-label") for drawing in found.drawings]
    assert labels[0] == "loss over steps"
    # s-1 has a child, whatever it said of itself before it had one
    assert [re.findall(r"<td>(.*?)</td>", row)[2] for row in re.findall(r"<tr><td>s-.*?</tr>", found.source)] == [
        "inner", "leaf", "leaf",
    ]  # fmt: skip


def test_a_run_that_failed_is_shown_with_its_error_and_what_went_before(tmp_path: Path) -> None:
    events = [
        {"event": "state", "step": 0, "state": "running", "reason": ""},
        {"event": "sphere_joined", "step": 0, "sphere": "s-1"},
        {"event": "sphere_lost", "step": 7, "sphere": "s-2", "reason": "its lease ran out"},
        {"event": "checkpoint", "step": 8, "ok": True, "path": "x"},
        {"event": "checkpoint", "step": 9, "ok": False, "error": "No space left on device"},
        {"event": "state", "step": 9, "state": "error", "reason": "task failed"},
        {"event": "error", "step": 9, "error": "task failed on s-1"},
        {"event": "sphere_lost", "step": 9, "sphere": "s-1", "reason": "it ended its link"},
        {"event": "state", "step": 9, "state": "initializing", "reason": ""},
        {"event": "sphere_lost", "step": 10, "sphere": "s-4", "reason": "after the resume"},
    ]
    ended = summary(state="error", error="task failed on s-1", reason="task failed on s-1", tree={}, spheres=[])
    found = page(tmp_path, [step_record(n) for n in range(9)], events=events, ended=ended)
    assert ("p", {"class": "error"}) in found.elements
    assert found.text.count("task failed on s-1") == 2  # above, and in the table; not once more as the reason
    table = found.source[found.source.index("Out of the ordinary") :]
    assert re.findall(r"<td>(.*?)</td>", table) == [
        "7", "sphere lost", "s-2 its lease ran out",
        "9", "checkpoint", "No space left on device",
        "9", "error", "task failed on s-1",
        "10", "sphere lost", "s-4 after the resume",
    ]  # fmt: skip
    assert "Tree" not in found.text


def test_a_run_without_a_step_or_without_an_end(tmp_path: Path) -> None:
    ended = summary(state="error", error="no module named x", steps=0, loss=None, metrics={}, spheres=[], tree={})
    found = page(tmp_path, [], ended=ended)
    assert "no module named x" in found.text
    assert found.drawings == []
    (tmp_path / "summary.json").unlink()
    found = page(tmp_path, [step_record(0)])
    assert "unfinished" in found.text
    assert len(found.drawings) == 6  # one step alone is a dot, or a bar


def test_a_directory_without_a_run_and_one_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"holds no run: there is neither journal.jsonl nor summary.json in it"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "journal.jsonl").write_text(json.dumps(step_record(0)) + "\n")
    (tmp_path / "report.html").write_text("older")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot write .*report.html: No space left on device"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "older"
    assert not (tmp_path / ".report.html.tmp").exists()


def test_the_page_says_what_held_steps_up(tmp_path: Path) -> None:
    ended = summary(bottleneck="compute on s-2: 72 % of the step")
    page(tmp_path, [step_record(0)], ended=ended)
    assert "Bottleneck: compute on s-2: 72 % of the step" in (tmp_path / "report.html").read_text()


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    sphere = {"id": f"s{EVIL}1", "parent": "control", "host": EVIL, "role": EVIL, "phase_seconds": {EVIL: 1.0}}
    ended = summary(
        run_id=EVIL, state=EVIL, error=EVIL, reason=f"because {EVIL}", metrics={EVIL: 0.5, f"accuracy{EVIL}": 0.5},
        weights_sha256=EVIL, bottleneck=EVIL, spheres=[sphere], tree={sphere["id"]: EVIL},
    )  # fmt: skip
    steps = [step_record(n, metrics={EVIL: 0.5}, phases={EVIL: {"sum": 0.1}}) for n in range(5)]
    events = [
        {"event": "evaluation", "step": 3, "loss": 1.0, "metrics": {EVIL: 0.5}},
        {"event": "sphere_lost", "step": 3, "sphere": EVIL, "reason": EVIL},
        {"event": "error", "step": 3, "error": EVIL},
    ]
    found = page(
        tmp_path, steps, events=events, ended=ended, config={"task": EVIL, "optimizer": {"name": EVIL}, "seed": EVIL}
    )
    assert "<script" not in found.source
    assert "<img" not in found.source
    assert found.text.count(EVIL) >= 12
    assert found.drawings  # and the drawings are still well-formed


def test_of_a_step_done_again_the_last_is_shown_and_none_of_a_course_that_was_left(tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [step_record(n, loss=1.0) for n in range(8)]
    steps += [{"event": "forget", "from_step": 4}, *(step_record(n, loss=3.0) for n in (4, 5))]
    found = page(tmp_path, steps)
    (points,) = [n.get("points", "").split() for n in found.drawings[0].iter() if n.get("stroke-width") == "2"]
    heights = [float(point.partition(",")[2]) for point in points]
    assert len(points) == 6  # steps 6 and 7 are not shown
    assert len(set(heights[:4])) == len(set(heights[4:])) == 1
    assert heights[4] < heights[0]


def test_what_cannot_be_read_or_drawn_is_passed_over(tmp_path: Path) -> None:
    steps = [step_record(n, loss=math.nan if n == 2 else math.inf if n == 3 else 1.0) for n in range(6)]
    page(tmp_path, steps, ended=summary(loss=math.nan, metrics={"accuracy": None, "x": math.inf}))
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('[]\n{"event": "step"}\n{"step": "x"}\nnonsense\n{"event":"step","st')
    assert len(Page(write_report(tmp_path)).drawings) == 7


def test_a_long_run_gives_a_page_of_bounded_size(tmp_path: Path) -> None:
    found = page(tmp_path, [step_record(n) for n in range(2500)], ended=summary())
    assert len(found.source) < 150_000


# --- charts


FINITE = st.floats(-1e12, 1e12, allow_nan=False)


@given(FINITE, st.floats(1e-6, 1e12), st.integers(2, 8))
def test_ticks_are_round_within_the_range_and_about_as_many_as_asked_for(low: float, span: float, count: int) -> None:
    high = low + span
    found = ticks(low, high, count)
    if span < 1e-9 * abs(low):
        return  # closer together than digits tell
    slack = 1e-6 * span
    assert all(low - slack <= tick <= high + slack for tick in found)
    assert count // 3 <= len(found) <= count + 2


def test_a_range_of_nothing_has_one_tick() -> None:
    assert ticks(3.0, 3.0) == [3.0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.123456, "0.1235"), (-12.5, "-12.5"), (999.5, "999.5"), (1234, "1,234"), (10_000, "10 k"),
     (250_000, "250 k"), (1.5e6, "1.5 M"), (-2e9, "-2 G"), (1e-5, "1e-05")],
)  # fmt: skip
def test_numbers_are_short(value: float, shown: str) -> None:
    assert short(value) == shown


def test_means_of_neighbours_keep_the_last_place_and_the_mean() -> None:
    points = [(float(x), float(x % 7)) for x in range(1001)]
    few = downsample(points, 100)
    assert len(few) == 100
    assert few[-1][0] == 1000.0
    assert math.fsum(y for _, y in few) / 100 == pytest.approx(3.0, abs=0.05)
    assert downsample(points[:100], 100) == points[:100]


def places(drawing: str) -> list[tuple[float, float]]:
    root = ET.fromstring(drawing[drawing.index("<svg") :])
    text = " ".join(node.get("points", "") for node in root.iter())
    return [(float(x), float(y)) for x, y in (place.split(",") for place in text.split())]


@given(st.lists(st.tuples(st.integers(0, 10**6), FINITE), min_size=1, max_size=30, unique_by=lambda p: p[0]))
def test_lines_stay_within_their_axes(points: list[tuple[int, float]]) -> None:
    series = Series("a", [(float(x), y) for x, y in sorted(points)], "#000")
    for y_range in ((None, None), (0.0, None), (None, 1.0)):
        for x, y in places(line_chart([series], y_label="a", y_range=y_range)):
            assert 65 <= x <= 607
            assert 29 <= y <= 241


def test_one_wild_step_leaves_the_picture_and_does_not_flatten_the_rest() -> None:
    noise = [(float(x), 500.0 if x == 50 else 1.0 + x % 2) for x in range(200)]
    drawn = line_chart(
        [Series("raw", noise, "#000", faint=True), Series("mean", [(0.0, 1.5), (199.0, 1.5)], "#000")], y_label="a"
    )
    heights = sorted(y for _, y in places(drawn))
    assert heights[0] >= 29
    assert heights[-10] - heights[10] > 60  # 1 and 2 are still apart
    slow = [1.0] * 50 + [900.0] + [1.0] * 50
    bars = places(stacked_chart([float(x) for x in range(101)], {"a": slow}, {"a": "#000"}, y_label="ms"))
    assert sorted(y for _, y in bars)[10] < 150


@given(st.lists(st.lists(st.floats(0, 1e6), min_size=4, max_size=4), min_size=1, max_size=4))
def test_layers_stay_within_their_axes(layers: list[list[float]]) -> None:
    named = {f"phase {n}": values for n, values in enumerate(layers)}
    drawing = stacked_chart([1.0, 2.0, 3.0, 9.0], named, dict.fromkeys(named, "#000"), y_label="ms")
    assert all(65 <= x <= 607 and 29 <= y <= 241 for x, y in places(drawing)) if drawing else not any(map(any, layers))


def test_a_chart_of_nothing_is_nothing() -> None:
    assert line_chart([Series("a", [], "#000")], y_label="a") == ""
    assert stacked_chart([], {}, {}, y_label="a") == ""
    assert stacked_chart([1.0], {"a": [0.0]}, {"a": "#000"}, y_label="a") == ""


def test_a_legend_is_there_where_there_is_more_than_one_line_to_tell_apart() -> None:
    a, b = Series("a", [(0, 1), (1, 2)], "#000"), Series("b <x>", [(0, 1), (1, 2)], "#111")
    assert "key" not in line_chart([a], y_label="y")
    assert "b &lt;x&gt;" in line_chart([a, b], y_label="y")
    assert legend({"send_up": "#000"}) == '<p class="key"><span><i style="background:#000"></i>send up</span></p>'


def complete(count: int, fan_out: int) -> dict[str, str]:
    return {f"s-{n}": "control" if n <= fan_out else f"s-{(n - 1) // fan_out}" for n in range(1, count + 1)}


@pytest.mark.parametrize(
    "parents",
    [{}, complete(1, 2), complete(6, 2), complete(30, 3), complete(30, 12), complete(60, 12), complete(25, 1),
     {"s-1": "gone", "s-2": "s-1", "s-3": "s-3"}],
)  # fmt: skip
def test_nodes_of_a_tree_do_not_overlap_and_stay_in_the_picture(parents: dict[str, str]) -> None:
    notes = dict.fromkeys(parents, "12,345,678 samples")
    root = ET.fromstring(tree_chart(parents, colors={}, notes=notes))
    width, height = (float(value) for value in root.get("viewBox", "").split()[2:])
    boxes = []
    for node in root.iter():
        name = node[0].text if len(node) else ""
        if node.tag == "rect":
            x, y, w, h = (float(node.get(key, "")) for key in ("x", "y", "width", "height"))
            boxes.append((name, x, y, x + w, y + h))
        elif node.tag == "circle":
            x, y, r = (float(node.get(key, "")) for key in ("cx", "cy", "r"))
            boxes.append((name, x - r, y - r, x + r, y + r))
    assert len(boxes) == len(parents) + 1
    assert {str(name).split()[0] for name, *_ in boxes} == {"control", *parents}
    for _, left, top, right, bottom in boxes:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
    for (_, l1, t1, r1, b1), (_, l2, t2, r2, b2) in itertools.combinations(boxes, 2):
        assert r1 <= l2 or r2 <= l1 or b1 <= t2 or b2 <= t1
    assert len([node for node in root.iter() if node.tag == "path"]) == len(parents)
