"""Faults on real processes of a running tree: does what ``control.chaos`` has drawn, and watches what follows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from control.chaos import Fault, Outcome, Target, choose, table
from control.client import Client
from control.processes import command_of, end_of, environment_of, folder_of, is_sphere
from control.run_dir import find, meant, process_of
from spheres.errors import ArmillaryError, RunStateError

__all__ = ["Storm"]

#: seconds to wait for a step before the first fault, and after the last
COMMIT_SECONDS = 60.0
#: seconds between two looks for a control that is gone
LOOK_SECONDS = 0.1


class Storm:
    """One storm. Mutable state: what was done, who is stopped, and when steps were committed."""

    def __init__(
        self,
        address: str | None,
        run_dir: Path | None,
        *,
        say: Callable[[dict[str, Any]], None],
        targets: str,
        stop_seconds: float,
    ) -> None:
        self._flags = address, run_dir = meant(address, run_dir)
        self._say, self._targets, self._stop_seconds = say, targets, stop_seconds
        self.error: ArmillaryError | None = None
        self._address = ""
        self._run_dir: Path | None = run_dir
        self._outcomes: list[Outcome] = []
        #: those after which no step has been committed so far
        self._open: list[Outcome] = []
        # whether events come from control
        self._watched = False
        # control is on this machine, and so are its clock and each fault's time by it
        self._here = False
        self._nanos: dict[int, int] = {}
        self._stopped: dict[int, int] = {}  # pid -> its descriptor
        self._refused: set[str] = set()
        #: for faults while control is away
        self._last_seen: list[Target] = []
        #: controls that were started here; they go on
        self._controls: list[subprocess.Popen[bytes]] = []
        self._began = 0.0
        self._step = self._first_step = 0
        self._over = False
        self._news = asyncio.Event()

    def result(self) -> dict[str, Any]:
        """Return all that happened, as JSON values."""
        return {
            "steps": self._step - self._first_step,
            "faults": [outcome.to_dict() for outcome in self._outcomes],
            "table": table(self._outcomes),
        }

    async def run(self, faults: Sequence[Fault], duration: float) -> None:
        """Carry out the faults. Whoever is stopped goes on at the end, whatever the end is."""
        self._address = find(*self._flags)
        async with Client(self._address) as client:
            run = await client.status()
        self._step = self._first_step = run.step
        self._run_dir = Path(run.run_dir)
        self._here = process_of(self._run_dir) is not None
        loop, me = asyncio.get_running_loop(), asyncio.current_task()
        assert me is not None
        loop.add_signal_handler(signal.SIGTERM, me.cancel)
        self._began = loop.time()
        jobs: list[asyncio.Task[None]] = []
        watching = asyncio.create_task(self._watch())
        try:
            await self._until(lambda: self._step > self._first_step, COMMIT_SECONDS)
            if self._step == self._first_step:
                raise RunStateError(f"no step was committed in {COMMIT_SECONDS:g} s; see control-cli status")
            await self._living()  # for a fault that comes when control is away
            self._began = loop.time()
            for fault in faults:
                await self._until(lambda: self._over, self._began + fault.at - loop.time())
                if self._over:
                    break
                await self._carry_out(fault, jobs)
            await self._until(lambda: self._over, self._began + duration - loop.time())
            await asyncio.gather(*jobs)
            await self._until(lambda: self._over or not self._open, COMMIT_SECONDS)
        except ArmillaryError as error:
            self.error = error
        finally:
            watching.cancel()
            for job in jobs:
                job.cancel()
            await asyncio.gather(watching, *jobs, return_exceptions=True)
            for pid in list(self._stopped):
                self._go_on(pid)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until ``condition`` holds, for so many seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                while not condition():
                    self._news.clear()
                    await self._news.wait()

    # ---- what the run does

    async def _watch(self) -> None:
        """Note each committed step, over control's own restarts, until the run is over."""
        while not self._over:
            try:
                # a control that came back may listen elsewhere
                self._address = self._flags[0] or find(None, self._run_dir)
                async with Client(self._address) as client:
                    async for event in client.watch(patience=0.0):
                        self._watched = True
                        self._news.set()
                        if event.name == "step":
                            self._committed(event.record["step"], int(event.time.timestamp() * 1e9))
                    self._over = True
            except ArmillaryError:
                self._watched = False
                # a control that was killed leaves its address behind, one that has ended does not
                self._over = self._run_dir is not None and not (self._run_dir / "address").exists()
                await asyncio.sleep(LOOK_SECONDS)
        self._news.set()

    def _committed(self, step: int, nanos: int) -> None:
        now = asyncio.get_running_loop().time() - self._began
        self._step = step + 1
        # what had been committed before the fault and was still on its way here does not count
        following = [outcome for outcome in self._open if nanos >= self._nanos.get(id(outcome), 0)]
        for outcome in following:
            outcome.seconds = now - outcome.at
            self._say({"event": "went_on", "sphere": outcome.sphere, "kind": outcome.kind, "seconds": outcome.seconds})
            self._open.remove(outcome)
        self._news.set()

    # ---- what is done to it

    async def _carry_out(self, fault: Fault, jobs: list[asyncio.Task[None]]) -> None:
        if fault.kind == "control":
            jobs.append(asyncio.create_task(self._kill_control(fault)))
            return
        found = await self._hold_one(fault)
        if found is None:
            self._say({"event": "nobody", "kind": fault.kind, "why": "no sphere of that kind is here now"})
            return
        target, descriptor = found
        if fault.kind == "kill":
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
        else:
            signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
            self._stopped[target.pid] = descriptor
            jobs.append(asyncio.create_task(self._go_on_later(target.pid)))
        self._note(fault, target)

    async def _hold_one(self, fault: Fault) -> tuple[Target, int] | None:
        """Return who is hit, and a descriptor of its process; None where nobody is there."""
        targets = await self._living()
        while (target := choose(fault, targets)) is not None:
            descriptor = self._held(target)
            if descriptor is not None:
                return target, descriptor
            targets.remove(target)
        return None

    def _note(self, fault: Fault, target: Target) -> None:
        at = asyncio.get_running_loop().time() - self._began
        outcome = Outcome(at, fault.kind, target.sphere, target.role, target.pid, self._step)
        if self._here:
            self._nanos[id(outcome)] = time.time_ns()
        self._outcomes.append(outcome)
        self._open.append(outcome)
        self._say({"event": "fault", **outcome.to_dict()})

    async def _living(self) -> list[Target]:
        """Return the spheres of this machine that may be hit now; others are refused with a word."""
        try:
            async with Client(self._address) as client:
                spheres = await client.spheres()
        except ArmillaryError:
            # control is being killed itself
            return [target for target in self._last_seen if target.pid not in self._stopped]
        found = []
        for sphere in spheres:
            said = sphere.report
            if sphere.state != "active" or said.pid in self._stopped:
                continue
            if said.host != socket.gethostname():
                self._refuse(sphere.sphere_id, f"it is on {said.host}, another machine")
                continue
            role = said.role or "leaf"
            if self._targets in ("any", role):
                found.append(Target(sphere.sphere_id, said.pid, role))
        self._last_seen = found
        return list(found)

    def _held(self, target: Target) -> int | None:
        """Return a descriptor of a target's process, once it is sure that it is a sphere of this run."""
        try:
            descriptor = os.pidfd_open(target.pid)
        except (OSError, AttributeError):
            self._refuse(target.sphere, f"process {target.pid} is gone, or cannot be held on this system")
            return None
        # with the process held: its id cannot become another's between the look and the signal
        if is_sphere(target.pid, self._address):
            return descriptor
        os.close(descriptor)
        self._refuse(target.sphere, f"process {target.pid} is no sphere of this run")
        return None

    def _refuse(self, sphere: str, why: str) -> None:
        if sphere not in self._refused:
            self._refused.add(sphere)
            self._say({"event": "refused", "sphere": sphere, "why": why})

    async def _go_on_later(self, pid: int) -> None:
        await asyncio.sleep(self._stop_seconds)
        self._go_on(pid)

    def _go_on(self, pid: int) -> None:
        descriptor = self._stopped.pop(pid, None)
        if descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
            os.close(descriptor)
            self._say({"event": "continued", "pid": pid})

    # ---- control itself

    async def _kill_control(self, fault: Fault) -> None:
        """Kill control and start it again, as whoever looks after it would, where it was and as it was.

        One that is on its way back from the kill before is waited for.
        """
        assert self._run_dir is not None
        await self._until(lambda: self._watched or self._over, COMMIT_SECONDS)
        if not self._watched:
            return
        self._watched = False
        pid = process_of(self._run_dir)
        words = command_of(pid) if pid is not None else []
        if pid is None or "start" not in words or not any(w.endswith(("control", "control-cli")) for w in words):
            self._refuse("control", "it is no `control-cli start` on this machine, and could not be started again")
            return
        folder, environment = folder_of(pid), environment_of(pid)
        for name in ("ARMILLARY_RESUME", "ARMILLARY_RUN_DIR"):
            environment.pop(name, None)
        descriptor = os.pidfd_open(pid)
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        self._note(fault, Target("control", pid, "control"))
        await end_of(descriptor)  # and so of its lock
        command = [sys.executable, "-m", "control", "start", "--json", "--resume", str(self._run_dir)]
        with (self._run_dir / "logs" / "control.log").open("ab") as log:
            process = subprocess.Popen(  # noqa: ASYNC220 - it does not wait
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._controls.append(process)
        self._say({"event": "control_started", "pid": process.pid})
