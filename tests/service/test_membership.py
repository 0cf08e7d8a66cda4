"""Spheres that come, go and move by command, in a tree in memory: the weights are the reference loop's all the same."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from control import tree as tree_module
from control.config import RunConfig
from control.placement import CONTROL
from control.reference import reference
from control.testing import HOST, LocalTree, control_node, local_tree
from spheres.errors import ConfigError, UnreachableError
from spheres.sphere import Sphere, SphereOptions
from spheres.testing.memory import MemoryNetwork, MemoryTransport
from spheres.testing.synthetic import Synthetic
from spheres.transport import Handlers, Link
from spheres.v1 import control_pb2
from spheres.v1 import work_pb2 as pb

TASK = Synthetic(parameters=3_000, samples=200, compute_seconds=0.0)


def config(**changes: Any) -> RunConfig:
    settings = {"task": "synthetic", "steps": 12, "batch_size": 48, "microbatches": 12, "spheres": 6, "fan_out": 2}
    small = {"chunk_bytes": 4096, "window_chunks": 2, "eval_every": None, "checkpoint_every": None}
    return RunConfig(**{**settings, **small, **changes})


@contextlib.asynccontextmanager
async def training(tmp_path: Any, **changes: Any) -> AsyncIterator[tuple[LocalTree, MemoryNetwork, asyncio.Task[str]]]:
    """A tree whose run has begun; it goes on to its end."""
    network = MemoryNetwork()
    async with local_tree(
        config(**changes), TASK, lambda name: MemoryTransport(network, name), directory=tmp_path
    ) as local:
        running = asyncio.create_task(local.run())
        begun = asyncio.Event()
        publish = local.controller.publish
        local.controller.publish = lambda record: begun.set() if record.get("step") == 1 else None
        await begun.wait()
        local.controller.publish = publish
        yield local, network, running
        if not running.done():
            await running
        assert running.result() == reference(TASK, config(**changes), steps=local.controller.step).weights_sha256


def depth(local: LocalTree) -> int:
    return max(local.tree.members.levels)


def test_a_drained_sphere_leaves_with_its_children_placed_elsewhere(run, tmp_path):
    async def main() -> None:
        async with training(tmp_path, steps=2_000) as (local, _, running):
            left: list[tuple[str, bool]] = []
            local.tree.dismissed = lambda sphere, at_once: left.append((sphere, at_once)) or False
            local.tree.drain("s-1", "makes room")
            assert local.tree.state_of("s-1") == "draining"
            local.tree.drain("s-1", "x" * 2_000_000)  # too long for a message; it is told below all the same
            assert len(local.tree.members.reason_of("s-1")) == 1_000
            local.tree.drain("s-1", "said twice")
            await local.tree.until(lambda: local.tree.state_of("s-1") == "lost")
            assert not running.done()
            await local.tasks["s-1"]  # it ends by itself, without an error
            local.tree.drain("s-1", "it has gone already, as it was told")
            await local.tree.until(lambda: local.tree.living == 5)
            assert left[0] == ("s-1", False)
            assert local.tree.members.reason_of("s-1") == "said twice"
            local.controller.request_stop("seen")

    run(main())


def test_a_sphere_that_is_terminated_ends_at_once(run, tmp_path):
    async def main() -> None:
        async with training(tmp_path, steps=2_000) as (local, _, running):
            local.tree.terminate("s-5", "enough")
            await local.tree.until(lambda: local.tree.state_of("s-5") == "lost")
            assert not running.done()
            await local.tasks["s-5"]
            with pytest.raises(ConfigError, match="there is no sphere 's-50'; did you mean"):
                local.tree.terminate("s-50", "")
            with pytest.raises(ConfigError, match="see control-cli spheres"):
                local.tree.drain("nobody", "")
            local.controller.request_stop("seen")

    run(main())


def test_who_cannot_be_told_is_named_with_its_state(run, tmp_path):
    async def main() -> None:
        async with training(tmp_path) as (local, _, _running):
            await local.kill("s-6")
            await local.tree.until(lambda: local.tree.state_of("s-6") == "lost")
            with pytest.raises(ConfigError, match="s-6 is lost and cannot be told"):
                local.tree.drain("s-6", "")
            with pytest.raises(ConfigError, match="s-6 is lost and cannot be asked"):
                await local.tree.log_of("s-6", 10)

    run(main())


def test_a_rebalance_brings_everyone_to_its_place_between_two_steps(run, tmp_path):
    """Two inner spheres die; their children hang on control, until all are placed anew. Again: nothing to do."""

    async def main() -> None:
        async with training(tmp_path, spheres=12, fan_out=2, steps=2_000) as (local, _, running):
            await local.kill("s-1")
            await local.kill("s-4")
            await local.tree.until(lambda: local.tree.living == 10)
            steps: list[int] = []

            async def rebalance() -> tuple[list[str], list[str]]:
                steps.append(local.controller.step)
                result = await local.tree.rebalance()
                steps.append(local.controller.step)
                return result

            moved, late = await local.controller.between_steps(rebalance)
            assert not running.done()
            assert late == []
            assert moved
            assert steps[0] == steps[1]  # N11
            assert depth(local) == 3
            assert not local.tree.members.overfull
            assert await local.controller.between_steps(local.tree.rebalance) == ([], [])
            local.controller.request_stop("seen")

    run(main())


def test_losses_are_mended_without_a_command(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tree_module, "_SETTLE_SECONDS", 0.05)

    async def main() -> None:
        async with training(tmp_path, spheres=8, fan_out=2, steps=2_000) as (local, _, running):
            await local.kill("s-1")
            await local.tree.until(lambda: local.tree.living == 7)
            assert local.tree.members.overfull  # s-3 and s-4 went to control, which had s-2
            mended = lambda: local.tree.living == 7 and not local.tree.members.overfull  # noqa: E731
            await local.tree.until(lambda: mended() or running.done())
            assert not running.done()
            local.controller.request_stop("seen")
            await running

    run(main())


async def join(local: LocalTree, network: MemoryNetwork, host: str, *, listen: str = "", control: str = "") -> None:
    """Start one more sphere, on a host of that name; wait until it takes part."""
    name = f"s-{len(local.tree.spheres) + 1}"
    options = SphereOptions(
        control=control or local.tree.address, listen=listen or f"{host}:0", host=host, orphan_timeout=5.0
    )
    sphere = local.spheres[name] = Sphere(options, MemoryTransport(network, name), task=TASK)
    local.tasks[name] = asyncio.create_task(sphere.run())
    await local.tree.until(lambda: local.tree.shape().get(name) is not None)


def crossings(local: LocalTree) -> list[tuple[str, str]]:
    """Every edge between two hosts, as the host above and that below."""
    host = {CONTROL: HOST, **{name: sphere.member.host for name, sphere in local.tree.spheres.items()}}
    edges = [(host[parent], host[sphere]) for sphere, parent in local.tree.shape().items()]
    return sorted((above, below) for above, below in edges if above != below)


def test_hosts_form_a_chain_and_do_so_again_after_the_loss_of_a_head(run, tmp_path, monkeypatch):
    """Spheres of three hosts join one by one, in turn; one sum and one copy of the weights cross each host edge."""
    monkeypatch.setattr(tree_module, "_SETTLE_SECONDS", 0.05)

    async def main() -> None:
        async with training(tmp_path, spheres=2, fan_out=12, hosts_per_host=1, steps=2_000) as (
            local,
            network,
            running,
        ):
            for host in ("a", "b", HOST, "b", "a", "b", "a"):
                await join(local, network, host)
            assert crossings(local) == [("a", "b"), (HOST, "a")]
            await local.kill("s-3")  # the head of a: its spheres and b's go to control
            chain = lambda: crossings(local) in ([("a", "b"), (HOST, "a")], [("b", "a"), (HOST, "b")])  # noqa: E731
            await local.tree.until(lambda: (local.tree.living == 8 and chain()) or running.done())
            assert not running.done()
            await local.controller.between_steps(local.tree.rebalance)
            assert chain()
            local.controller.request_stop("seen")
            await running

    run(main())


def test_nobody_is_put_below_a_loopback_address_of_another_host(run, tmp_path, monkeypatch, caplog):
    """Spheres of three hosts listen on loopback, so all stay on control; the first that others can dial takes them."""
    monkeypatch.setattr(tree_module, "_SETTLE_SECONDS", 0.05)
    caplog.set_level("INFO", "spheres.sphere")

    async def main() -> None:
        async with training(tmp_path, spheres=2, fan_out=1, steps=2_000) as (local, network, running):
            network.listeners["control:7070"] = network.listeners[local.tree.address]
            for host in ("a", "b"):
                await join(local, network, host, listen="127.0.0.1:0", control="control:7070")
            assert local.tree.shape() == {"s-1": CONTROL, "s-2": "s-1", "s-3": CONTROL, "s-4": CONTROL}
            assert await local.controller.between_steps(local.tree.rebalance) == ([], [])
            await join(local, network, "c", control="control:7070")
            await local.tree.until(lambda: "s-5" in local.tree.shape().values() or running.done())
            assert not running.done()
            local.controller.request_stop("seen")
            await running

    run(main())
    said = [record.getMessage() for record in caplog.records if "--advertise" in record.getMessage()]
    assert [line.partition(": no sphere of another host")[0].rpartition(":")[0] for line in said] == [
        "only this machine reaches 127.0.0.1"
    ] * 2
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_who_does_not_move_is_late_and_training_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tree_module, "_REBALANCE_SECONDS", 0.1)

    async def main() -> None:
        async with training(tmp_path, spheres=6, fan_out=2, steps=2_000) as (local, _, running):
            # deaf to that one word
            parent = local.spheres["s-3"].parent
            assert parent is not None
            monkeypatch.setattr(parent, "move", lambda _ancestor: None)
            await local.kill("s-1")
            await local.tree.until(lambda: local.tree.living == 5)
            local.tree.members.spheres["s-3"].rests_until = 1e9  # not mended before
            moved, late = await local.controller.between_steps(local.tree.rebalance)
            assert "s-3" in late or local.tree.parent_of("s-3") == "control"
            assert "s-3" not in moved
            assert not running.done()
            assert local.tree.members.moving_to("s-3") is None
            local.controller.request_stop("seen")

    run(main())


@pytest.mark.slow
def test_the_end_of_a_log_comes_up_the_tree(run, tmp_path, monkeypatch):
    async def main() -> None:
        async with training(tmp_path) as (local, _, _running):
            sphere = local.spheres["s-6"]
            sphere._log_lines = lambda count: [f"line {n}" for n in range(100)][-count:]
            assert await local.tree.log_of("s-6", 3) == ["line 97", "line 98", "line 99"]
            with monkeypatch.context() as patch:
                patch.setattr(local.tree.hub, "direct", lambda _directive: None)
                patch.setattr(tree_module, "_LOG_SECONDS", 0.1)  # in vain, whatever the time
                with pytest.raises(UnreachableError, match=r"s-6 did not send its log in 0\.1 s"):
                    await local.tree.log_of("s-6", 3)

    run(main())


def test_a_sphere_that_joins_in_mid_run_is_put_where_there_is_room(run, tmp_path):
    async def main() -> None:
        async with training(tmp_path, spheres=3, fan_out=2, steps=2_000) as (local, network, running):
            options = SphereOptions(control=local.tree.address, host=HOST, orphan_timeout=5.0)
            sphere = Sphere(options, MemoryTransport(network, "s-4"), task=TASK)
            local.spheres["s-4"], local.tasks["s-4"] = sphere, asyncio.create_task(sphere.run())
            await local.tree.until(lambda: local.tree.living == 4)
            assert not running.done()
            assert local.tree.parent_of("s-4") == "s-1"
            local.controller.request_stop("seen")

    run(main())


def test_a_drain_that_its_sphere_missed_is_told_again_when_it_is_back(run, tmp_path):
    async def main() -> None:
        async with training(tmp_path) as (local, _, running):
            told: list[pb.Directive] = []
            local.tree.hub.direct = told.append
            local.tree.drain("s-6", "go")
            found = local.tree.spheres["s-6"]
            change = pb.SphereChange(
                sphere_id="s-6", incarnation=found.incarnation, session=found.link[1] + 1, parent_id=found.parent
            )
            local.tree._changed(change)
            assert [(d.kind, d.target_sphere_id) for d in told] == [(pb.DIRECTIVE_KIND_DRAIN, "s-6")] * 2
            del local.tree.hub.direct
            await running

    run(main())


def test_nobody_enrolls_in_a_run_that_is_over(run, tmp_path):
    async def main() -> None:
        async with training(tmp_path, steps=3) as (local, _, running):
            await running
            local.tree.stop_spheres("the run is over")
            with pytest.raises(Exception, match="the run is over"):
                local.tree.grant(control_pb2.EnrollSphereRequest(protocol_version=1))

    run(main())


def test_an_address_that_is_taken_leaves_no_second_keeper_of_leases(run, tmp_path):
    """Control tries the address of the control before it first, and its own where that is another's by now."""

    async def scenario() -> None:
        network = MemoryNetwork()
        control = control_node(config(), TASK, MemoryTransport(network, "control"), directory=tmp_path)
        other = await MemoryTransport(network, "other").listen("127.0.0.1:7000", Handlers(never, never))
        before = asyncio.all_tasks()
        with pytest.raises(ConfigError):
            await control.tree.listen("127.0.0.1:7000")
        assert asyncio.all_tasks() == before
        await other.aclose()
        control.close()

    async def never(_: Link) -> None:
        raise AssertionError

    run(scenario())
