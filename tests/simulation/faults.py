"""What is done to a world: each fault of its plan when it is due, to whom it hits and as strongly as the plan says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from spheres.testing.clock import Process
from spheres.testing.memory import Connection, Pipe
from spheres.transport import Rpc
from tests.simulation.plan import Fault

if TYPE_CHECKING:
    from tests.simulation.world import Node, World

#: seconds in which everybody is back who was out of reach
CALM_SECONDS = 6.0
#: seconds for which a dial may go on, in this network, after the partition in which it began
DIAL_SECONDS = 10.0
#: factor on a sphere's compute time
MOST_SLOW = 60.0


class Faults:
    """Mutable state: when the present step began and how long the one before took, by which faults are timed; and who
    is out of reach by them.
    """

    def __init__(self, world: World) -> None:
        self.world, self.plan = world, world.plan
        plan = self.plan
        self._step_began = 0.0
        self._step_seconds = plan.compute * plan.microbatches / max(1, plan.spheres - plan.relays) + 0.02
        self._step_reached = asyncio.Event()
        #: sphere -> until when it is out of reach
        self._until: dict[str, float] = {}

    def committed(self) -> None:
        """A step is committed, and the next begins."""
        now = self.world.loop.time()
        self._step_seconds = max(0.001, now - self._step_began)
        self._step_began = now
        self._step_reached.set()

    async def run(self) -> None:
        world, loop = self.world, self.world.loop
        for fault in self.plan.faults:
            while world.step < fault.step:
                self._step_reached.clear()
                await self._step_reached.wait()
            # by the clock: a step that hangs is hit all the same
            at = self._step_began + fault.part * self._step_seconds
            if at > loop.time():
                await asyncio.sleep(at - loop.time())
            if world.over or world.finished.done():
                return
            world.counts[fault.kind] += 1
            self._strike(fault)

    def trouble(self, node: Node) -> str:
        """Return what a sphere's task does at its next microbatch: "", "raise", "nan"."""
        trouble, _, always = node.trouble.partition(" ")
        if not always:
            node.trouble = ""
        if trouble:
            self.world.network.changes += 2  # once more elsewhere, and here again after a rest
        return trouble

    # ---- who is out of reach

    def out_of_reach(self, names: Iterable[str], since: float) -> bool:
        """Whether one of these spheres was, at or after a time; or shortly before: its neighbours may not know yet."""
        return any(self._until.get(name, -CALM_SECONDS) + CALM_SECONDS > since for name in names)

    def way_of(self, node: Node) -> list[str]:
        """Return a sphere and those between it and control, as far as it knows."""
        parent = getattr(node.sphere, "parent", None)
        ids = set() if parent is None else {ancestor.id for ancestor in parent._ancestors}
        return [node.name, *(found.name for found in self.world.nodes.values() if found.id in ids)]

    def _isolate(self, names: Iterable[str], seconds: float) -> None:
        """So long these are out of reach, by their machine or by their links, and so are all below them."""
        struck, until = set(names), self.world.loop.time() + seconds
        for node in self.world.nodes.values():
            if not struck.isdisjoint(self.way_of(node)):
                self._until[node.name] = max(until, self._until.get(node.name, 0.0))

    # ---- whom it hits

    def _strike(self, fault: Fault) -> None:
        getattr(self, "_crash" if fault.kind == "control" else f"_{fault.kind}")(fault)

    def _one(self, fault: Fault, *, inner: bool | None = None) -> Node | None:
        found = self.world.living()
        if inner is not None:
            found = [n for n in found if bool(n.sphere and n.sphere.hub and n.sphere.hub.children) is inner] or found
        return found[int(fault.who * len(found))] if found else None

    def _stream(self, fault: Fault, rpc: Rpc | None = Rpc.WORK) -> Connection | None:
        found = [c for c in self.world.network.connections if rpc is None or c.rpc is rpc]
        return found[int(fault.who * len(found))] if found else None

    # ---- processes

    def _kill(self, fault: Fault, *, silent: bool = False) -> None:
        node = self._one(fault, inner=fault.variant < 0.5)
        if node is None:
            return
        node.again = fault.strength > 0.3
        self.world.say(f"FAULT kill of {node.called}")
        if silent:
            self._isolate([node.name], 2 * self.plan.patience)
        self.world.end(node, silent=silent)
        self.world.launch(node, 0.2 + fault.strength * 2)

    def _power(self, fault: Fault) -> None:
        self._kill(fault, silent=True)

    def _restart(self, fault: Fault) -> None:
        node = self._one(fault)
        if node is not None:
            self.world.say(f"FAULT restart of {node.called}")
            self.world.end(node)
            self.world.launch(node, fault.strength * 0.1)

    def _leave(self, fault: Fault) -> None:
        node = self._one(fault)
        if node is not None and node.sphere is not None:
            drains, sphere = fault.variant < 0.5, node.sphere
            self.world.say(f"FAULT {node.called} {'drains' if drains else 'leaves at once'}")
            node.leaving, node.again = True, False
            node.process.context().run((lambda: sphere.drain("a fault")) if drains else sphere.stop)

    def _join(self, fault: Fault) -> None:
        self.world.say("FAULT join")
        self.world.start_sphere(relay=fault.variant < 0.1)

    def _slow(self, fault: Fault) -> None:
        node = self._one(fault)
        if node is not None:
            factor = 2.0 + 30 * fault.strength
            self.world.say(f"FAULT {node.called} is {factor:.1f} times as slow")
            before, node.slow = node.slow, min(node.slow * factor, MOST_SLOW)
            if fault.variant < 0.7:
                self.world.loop.call_later(5 * fault.strength, lambda: setattr(node, "slow", before))

    def _stop(self, fault: Fault) -> None:
        node = self._one(fault, inner=fault.variant < 0.3)
        if node is None or node.process.stopped:
            return
        process, seconds = node.process, 12 * fault.strength
        if fault.variant > 0.85 and self.plan.keepalive is None:
            seconds = 200.0  # far longer than a run should need without it
        self.world.say(f"FAULT stop of {node.called} for {seconds:.3f} s")
        process.stop()
        self._isolate([process.name], seconds)
        self.world.network.silence(process.name, seconds)
        before = self.world.network.streams_from(process.name)
        self.world.loop.call_later(seconds, lambda: process.stopped and self._go_on(process, seconds, before))

    def _go_on(self, process: Process, seconds: float, before: list[Pipe]) -> None:
        self.world.say(f"{process.name} goes on")
        if seconds > self.plan.patience * 1.1:  # it has looked at the clock at most a tick before
            self.world.network.fence(before)
        process.go_on()

    def _crash(self, fault: Fault) -> None:
        world = self.world
        process, control = world.control_process, world.control
        if process is None or process.dead or process.main is None or process.main.done():
            return
        world.say("FAULT control is killed")
        process.kill()
        world.network.lost(process.name)
        if control is not None:
            control.close()
            if fault.variant < 0.2:
                with (world.directory / "journal.jsonl").open("ab") as file:
                    file.write(b'{"event":"step","step":1,"te')
        world.old_processes.append(process)
        world.loop.call_later(0.05 + 4 * fault.strength**2, world.control_again)

    # ---- links

    def _cut(self, fault: Fault) -> None:
        stream = self._stream(fault, Rpc.WORK if fault.variant < 0.8 else None)
        if stream is not None:
            late = fault.strength * 2
            first, second = (0.0, late) if fault.variant * 100 % 2 < 1 else (late, 0.0)
            self.world.say(f"FAULT cut of {stream}: known after {first:.3f} and {second:.3f} s")
            self._isolate([stream.dialler], late)
            self.world.network.break_off(stream, first, second)

    def _half(self, fault: Fault) -> None:
        stream = self._stream(fault)
        if stream is not None:
            known = fault.strength
            ends = (None, known) if fault.variant < 0.5 else (known, None)
            self.world.say(f"FAULT {stream} is half open: known after {ends} s")
            self._isolate([stream.dialler], known + 2 * self.plan.patience)
            self.world.network.break_off(stream, *ends)

    def _delay(self, fault: Fault) -> None:
        stream = self._stream(fault)
        if stream is not None:
            seconds = 3 * fault.strength**2
            self.world.say(f"FAULT delay of {seconds:.3f} s on {stream}")
            self._isolate([stream.dialler], 2 * seconds + fault.variant * 2)
            ends = (stream.dialler, stream.listener)
            for source, target in (ends, ends[::-1]) if fault.variant < 0.5 else (ends,):
                self.world.network.slow_down(source, target, seconds, lasting=fault.variant * 2)

    def _partition(self, fault: Fault) -> None:
        nodes = self.world.living()
        if nodes:
            count = max(1, int(len(nodes) * 0.4 * fault.variant))
            start = int(fault.who * len(nodes))
            names = [nodes[(start + i) % len(nodes)].name for i in range(count)]
            seconds = 10 * fault.strength
            both = fault.variant * 10 % 1 < 0.6
            self.world.say(
                f"FAULT partition of {' '.join(names)} for {seconds:.3f} s{'' if both else ', outward only'}"
            )
            self._isolate(names, seconds + DIAL_SECONDS)
            self.world.network.cut_off(names, seconds, both=both)

    def _tamper(self, fault: Fault) -> None:
        stream = self._stream(fault)
        if stream is not None:
            self.world.say(f"FAULT {fault.kind} on {stream}, {'up' if fault.variant < 0.5 else 'down'}")
            self.world.network.tamper(stream.up if fault.variant < 0.5 else stream.down, fault.kind)

    _duplicate = _reorder = _corrupt = _tamper

    # ---- disk and task

    def _disk(self, fault: Fault) -> None:
        seconds = 3 * fault.strength
        self.world.say(f"FAULT the disk is full for {seconds:.3f} s")
        self.world.disk.full = True
        self.world.loop.call_later(seconds, lambda: setattr(self.world.disk, "full", False))

    def _raise(self, fault: Fault) -> None:
        node = self._one(fault)
        if node is not None:
            kind = "raise" if fault.kind == "raise" else "nan"
            node.trouble = f"{kind} always" if fault.variant < 0.2 else kind
            self.world.say(f"FAULT the task of {node.called}: {node.trouble}")

    _nan = _raise
