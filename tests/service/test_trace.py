"""A traced run: every node on one time line, though no two clocks agree; nothing is missing at its end."""

import json
from collections import defaultdict
from time import monotonic_ns, sleep

import pytest

from control.config import RunConfig
from control.telling import Teller
from control.testing import local_tree
from control.training import Training
from spheres.grpc_link import GrpcTransport
from spheres.task import load_task
from spheres.trace import ClockOffset

#: nanoseconds by which the spheres' clocks are wrong
SKEW = {"s-1": 5_000_000_000, "s-2": -70_000_000_000, "s-3": 11_000_000_000}


def read(path):
    """Return the spans of a trace by node and name, with begin and end in seconds, and its steps of control's."""
    found = json.loads(path.read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in found if event["name"] == "process_name"}
    spans = defaultdict(list)
    for event in found:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            begin = event["ts"] / 1e6
            spans[names[event["pid"]], event["name"]].append(
                (event["args"].get("step"), begin, begin + event["dur"] / 1e6)
            )
    return spans


def computed(spans, journal):
    """Check that each sphere has a span for each step that it computed in; return all of those spans."""
    found = {node: {step for step, _, _ in spans[node, "compute"]} for node in ("s-1", "s-2", "s-3")}
    for record in map(json.loads, journal.read_text().splitlines()):
        for _, _, sphere in record["contributions"]:
            assert record["step"] in found[sphere], f"{sphere} has no span in step {record['step']}"
    return [span for (_, name), those in spans.items() if name == "compute" for span in those]


def test_all_nodes_stand_on_one_time_line_though_their_clocks_differ(run, tmp_path, monkeypatch):
    """And though control's process is held up, as on a busy machine, when it is about to say that a step has ended."""
    errors: list[int] = []
    offsets: dict[str, tuple[int, int]] = {}
    estimate = ClockOffset.estimate

    def noted(self, now):
        found = estimate(self, now)
        if found is not None:
            errors.append(found[1])
        return found

    def hold_up(told):
        def late(teller, name, stretch, step):
            if (name, step) == ("step", 10):
                sleep(0.2)
            told(teller, name, stretch, step)

        return late

    monkeypatch.setattr(ClockOffset, "estimate", noted)
    for told in ("span", "span_since"):
        monkeypatch.setattr(Teller, told, hold_up(getattr(Teller, told)))
    config = RunConfig(task="digits", steps=20, batch_size=100, spheres=3, fan_out=2, trace=True)
    task = load_task("digits")

    async def train():
        async with local_tree(
            config,
            task,
            lambda _: GrpcTransport(),
            directory=tmp_path,
            sphere_clock=lambda name: lambda: monotonic_ns() + SKEW[name],
        ) as tree:
            await tree.run()
            shape = tree.tree.shape()
            for name, sphere in tree.spheres.items():
                offsets[name] = estimate(sphere.parent.offset, sphere.parent.clock())
            tree.tree.stop_spheres("the run is over")
            assert await tree.tree.all_gone(5.0)
            return shape

    assert run(train()) == {"s-1": "control", "s-2": "control", "s-3": "s-1"}
    for name, above in (("s-1", 0), ("s-2", 0), ("s-3", SKEW["s-1"])):
        offset, error = offsets[name]
        assert abs(offset - (above - SKEW[name])) <= error
    spans = read(tmp_path / "trace.json")
    for node in ("s-1", "s-2", "s-3"):
        assert {name for owner, name in spans if owner == node} >= {"compute", "wait", "send_up", "send_down"}
    assert ("s-1", "sum") in spans, "only who has a child has something to add"
    assert ("s-3", "sum") not in spans
    assert {name for owner, name in spans if owner == "control"} == {
        "step", "sum", "receive", "optimizer", "journal", "evaluation", "checkpoint_copy", "checkpoint_save",
    }  # fmt: skip
    steps = {step: (begin, end) for step, begin, end in spans["control", "step"]}
    assert steps.keys() == set(range(20))
    slack = 2 * max(errors) / 1e9  # the deepest stands two estimates from control
    assert slack < 1.0, "answers took so long that nothing could be said"
    for step, begin, end in computed(spans, tmp_path / "journal.jsonl"):
        assert steps[step][0] - slack <= begin <= end <= steps[step][1] + slack


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_traced_run_of_processes_says_where_its_time_went(run, tmp_path):
    config = RunConfig(task="digits", steps=60, spheres=3, fan_out=2, trace=True, run_dir=tmp_path / "run")

    async def train():
        async with Training(config) as training:
            await training.step(30)
            from control.client import Client

            async with Client(training.controller.tree.address) as client:
                told = (await client.status()).bottleneck
            await training.run()
        return told, training.summary

    told, summary = run(train(), timeout=100)
    assert summary.error is None
    for line in (told, summary.bottleneck):
        assert " % of the step" in line
    spans = read(tmp_path / "run" / "trace.json")
    # one host: one clock, and what it is thought to differ by is small beside a second
    steps = {step: (begin, end) for step, begin, end in spans["control", "step"]}
    assert steps.keys() == set(range(60))
    for step, begin, end in computed(spans, tmp_path / "run" / "journal.jsonl"):
        assert steps[step][0] - 1.0 <= begin <= end <= steps[step][1] + 1.0


def test_a_run_that_is_not_traced_leaves_no_file(run, tmp_path):
    config = RunConfig(task="digits", steps=2, spheres=1)

    async def train():
        async with local_tree(config, load_task("digits"), lambda _: GrpcTransport(), directory=tmp_path) as tree:
            await tree.run()
            assert tree.tree.recorder is None

    run(train())
    assert not (tmp_path / "trace.json").exists()
