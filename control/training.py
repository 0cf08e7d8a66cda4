"""A whole run in this process, from configuration to summary: what ``control-cli start`` does, for Python.

from control import train
train("digits", epochs=3, spheres=2)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

from control.beginning import Beginning
from control.callbacks import configured
from control.checkpoint import CheckpointInfo
from control.config import RunConfig
from control.controller import Controller
from control.events import Callback, CallbackRegistry
from control.initial import initial_weights, node_config
from control.journal import EventLog, Journal
from control.launcher import launcher_for
from control.lives import Ended, RunFacts, Started
from control.script import script_folder, task_spec
from control.server import add_services
from control.servicers import ControlServicer
from control.summary import Summary, completed_at, summarize, write_results
from control.trace import traced
from control.tree import Tree
from spheres.config import NodeConfig
from spheres.environment import allow_many_files, tune_malloc
from spheres.errors import ArmillaryError, ConfigError, RefusedError, RunStateError, TaskError, TaskLoadError
from spheres.exposure import insecure_warning, is_loopback
from spheres.grpc_link import GrpcTransport
from spheres.hub import Array
from spheres.server import Health
from spheres.task import IN_SPHERE, Task, load_task

__all__ = ["Summary", "Training", "run", "train"]

log = logging.getLogger(__name__)

#: seconds that spheres have to say for the last time what they have done
_LAST_REPORTS_SECONDS = 2.0
#: seconds that spheres have to go once they are told that the run is over
_FAREWELL_SECONDS = 5.0
#: processes started by one request
_MOST_SPAWNED = 1_000


class Training:
    """One run: control in this process, its local spheres, its directory. An async context manager.

    It opens with the run made and paused; ``step``, ``run``, ``pause`` and ``resume`` move it. Leaving the context
    stops the run with a checkpoint, ends every sphere, and writes ``summary.json`` and ``report.html``.

    ``task`` is a name, ``module:attribute``, a class, or an object: spheres make their own by calling its class with
    ``config.task_options``. ``resume``: None for a new run, "" for the newest checkpoint of the run directory (of a
    run that was killed before its first: from the initial weights again), else a checkpoint's path. Entering raises
    what stands in the way of a start. A run that was completed stays so, and is told as it ended.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        task: Task | None = None,
        resume: str | None = None,
        callbacks: Sequence[Callback] = (),
        verbose: bool = False,
    ) -> None:
        self.config = config
        self.callbacks = CallbackRegistry(on_error=config.on_callback_error)
        self._task, self._resume, self._verbose = task, resume, verbose
        self._given = callbacks
        #: listens where a control that was killed had listened
        self._came_back = False
        #: why it was told to stop, if it was: also before it has opened
        self._told = ""
        self._health = Health()
        self._servicer = ControlServicer()
        self._first_step = 0
        #: of a run that was completed before this process
        self._completed: Summary | None = None
        self._stack = contextlib.AsyncExitStack()
        self._began = time.monotonic()

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            self.controller.request_stop("left" if error is None else type(error).__name__)
            await self._end()
        finally:
            await self._stack.aclose()

    async def _end(self) -> None:
        """Let the run end, and every sphere go; write the results; end the watches. What is served else stays.

        May be called again.
        """
        if hasattr(self, "_summary"):
            return
        await self._run_to_end()
        await self._tree.states(_LAST_REPORTS_SECONDS)
        self._summary = self._summarize()
        self._launcher.expect_end()
        self._tree.stop_spheres("the run is over")
        await self._tree.all_gone(_FAREWELL_SECONDS)
        # while the directory is still ours: the next start must find the results of this one, not race them
        if self._completed is None:
            await asyncio.to_thread(write_results, self._directory, self.controller, self._summary)
        self._servicer.close()  # who watches has had the last event, and finds the results

    # ---- what a user does with it

    async def run(self) -> Summary:
        """Train to the end and return the summary, also of a run that failed."""
        await self._run_to_end()
        return self._summarize()

    async def _run_to_end(self) -> None:
        with contextlib.suppress(ArmillaryError):  # it has ended already
            self.controller.resume()
        await asyncio.wait({self._loop})

    async def step(self, count: int = 1) -> None:
        """Do so many steps, then pause; 0 only pauses.

        Raises ConfigError for less than 0, RunStateError where the run has ended, or the error that ended it.
        """
        await self.controller.advance(count)
        if self.controller.error is not None:
            raise self.controller.error

    def pause(self) -> None:
        """Finish the step in hand, then wait."""
        self.controller.pause()

    def resume(self) -> None:
        """Go on after a pause."""
        self.controller.resume()

    def stop(self, reason: str = "asked to stop") -> None:
        """Finish the step in hand, checkpoint, end; where the run is still opening, end once it has."""
        self._told = self._told or reason
        if not hasattr(self, "controller"):
            return
        self.controller.request_stop(self._told)
        with contextlib.suppress(ArmillaryError):
            self.controller.resume()

    async def save(self) -> CheckpointInfo:
        """Checkpoint after the step in hand. Raises CheckpointError; the run goes on."""
        return await self.controller.save()

    async def restore(self, name: str | None = None) -> None:
        """Go to a checkpoint of this run, None: the newest good one. Raises CheckpointError, with nothing changed."""
        await self.controller.restore(name)

    async def spawn(self, count: int = 1) -> list[Started]:
        """Start so many more spheres; return the launcher's name of each, and its process id where it is local.

        Raises ConfigError, RunStateError, and what the launcher does.
        """
        if not 0 < count <= _MOST_SPAWNED:
            raise ConfigError(f"cannot start {count} spheres: give a number from 1 to {_MOST_SPAWNED}")
        if self.controller.state.ended:
            raise RunStateError(f"the run is {self.controller.state}; go on with --resume")
        return await self._launcher.start(count)

    def drain(self, sphere: str, reason: str = "") -> None:
        """Let a sphere finish its step and leave. Raises ConfigError where no such one can be reached."""
        self._tree.drain(sphere, reason)

    def terminate(self, sphere: str, reason: str = "") -> None:
        """End a sphere at once. Raises ConfigError where no such one can be reached."""
        self._tree.terminate(sphere, reason)

    async def rebalance(self) -> tuple[list[str], list[str]]:
        """Place all spheres anew, between two steps. Returns who has moved, and who has not arrived in time."""
        return await self.controller.between_steps(self._tree.rebalance)

    @property
    def summary(self) -> Summary:
        """How the run is now; once the context is left, how it ended."""
        return self._summary if hasattr(self, "_summary") else self._summarize()

    def kill(self) -> None:
        """End every sphere of the launcher at once and leave nothing that points here; for a process that ends now."""
        if hasattr(self, "_launcher"):
            self._launcher.kill()
        if hasattr(self, "_directory"):
            self._directory.close()

    # ---- opening

    async def _open(self) -> None:
        config = self.config
        tune_malloc()
        allow_many_files()
        task = self._task
        if task is None:
            task = await asyncio.to_thread(load_task, config.task, config.task_options)
        # everything that can be wrong with task or weights is found before anything is written
        manifest, flat = await asyncio.to_thread(initial_weights, task, config)
        node = node_config(task, config, manifest, run_id="")
        for callback in [*configured(config), *self._given]:
            self.callbacks.register(callback)
        make_launcher = await asyncio.to_thread(launcher_for, config)
        beginning = await Beginning.open(config, self._resume)
        directory = self._directory = beginning.directory
        self._stack.callback(directory.close)
        await beginning.find()
        node = replace(node, run_id=directory.run_id)
        await self._open_tree(node)
        self._make_controller(node, beginning, flat)
        self._tree.changed = self._sphere_changed
        self._tree.dismissed = self._sphere_dismissed
        directory.write_address(self._tree.address)
        self._launcher = make_launcher(
            RunFacts(
                self._tree.address,
                directory.path / "logs",
                self._sphere_ended,
                linked=self._linked,
                until=self._tree.until,
                orphan_timeout=config.orphan_timeout,
                path=script_folder(),
                verbose=self._verbose,
            )
        )
        self._stack.push_async_callback(self._launcher.aclose)
        self._servicer.attach(self.controller, spawn=self.spawn, aside=self._launcher.aside)
        self.controller.pause()
        self._loop = asyncio.create_task(self.controller.run())
        self._stack.push_async_callback(self._end_loop)
        if self._told:
            self.stop(self._told)
            return
        if self._completed is None:
            await self._launcher.begin(config.spheres, came_back=self._came_back)
        self._health.set_ready(True)

    async def _open_tree(self, node: NodeConfig) -> None:
        """Listen for spheres and clients, in a new term that is not raised yet."""
        directory = self._directory
        transport = GrpcTransport(lambda server: add_services(server, self._servicer, self._health))
        self._tree = Tree(
            node,
            transport,
            host=socket.gethostname(),
            term=int(directory.info["term"]) + 1,
            hosts_per_host=self.config.hosts_per_host,
        )
        await self._stack.enter_async_context(
            traced(self._tree.recorder, directory.path, run_id=directory.run_id, term=self._tree.term)
        )
        await self._listen(directory.last_address)
        self._stack.push_async_callback(self._tree.aclose)
        self._stack.callback(self._servicer.close)

    def _make_controller(self, node: NodeConfig, beginning: Beginning, flat: Array) -> None:
        """Raise the term, and make the run as it begins, or stands in its checkpoint."""
        directory, settings = self._directory, self.config.model_dump(mode="json")
        directory.raise_term(settings)
        journal, events = Journal(directory.path / "journal.jsonl"), EventLog(directory.path / "events.jsonl")
        self._stack.callback(journal.close)
        self._stack.callback(events.close)
        self.controller = Controller(
            self.config,
            node,
            self._tree,
            run_dir=directory.path,
            journal=journal,
            events=events,
            checkpoints=beginning.checkpoints,
            callbacks=self.callbacks,
            raise_term=lambda: directory.raise_term(settings),
        )
        self.controller.start_from(flat)
        if beginning.snapshot is not None:
            self.controller.tell_passed_over(beginning.passed_over)
            ended = completed_at(directory.path, beginning.snapshot.run.step)
            self.controller.load(beginning.snapshot, evaluated=ended is not None)
            self._completed = ended if self.controller.complete else None
        self._first_step = self.controller.step
        beginning.allow_another_total(journal, node.sampler.steps_per_epoch, self._first_step)

    def _linked(self) -> set[tuple[str, int]]:
        """Return host and process id of the spheres that have a way to control."""
        return {(sphere.member.host, sphere.pid) for sphere in self._tree.spheres.values() if sphere.active}

    async def _listen(self, last_address: str) -> None:
        """Listen where a control that was killed had listened: its spheres may still dial there (DESIGN section 5)."""
        any_port = self.config.listen.endswith(":0")
        try:
            await self._tree.listen(last_address if last_address and any_port else self.config.listen)
        except ConfigError:
            if not (last_address and any_port):
                raise
            log.warning(
                "%s, where this run's control had listened, is taken: spheres that it left behind will not find this "
                "one, and end after --orphan-timeout",
                last_address,
            )
            await self._tree.listen(self.config.listen)
        if not is_loopback(self._tree.address.rpartition(":")[0]):
            log.warning("%s", insecure_warning(self._tree.address))
        port = self._tree.address.rpartition(":")[2]
        self._came_back = bool(last_address) and last_address.rpartition(":")[2] == port
        if self._came_back:
            self._tree.came_back()

    def _sphere_ended(self, ended: Ended) -> None:
        """A sphere of the launcher is gone before its time. It is started again, unless that is hopeless."""
        controller = self.controller
        kind = {2: ConfigError, 3: TaskError, 5: RefusedError}.get(ended.code or 0)
        if kind is not None and controller.step == self._first_step:
            controller.fail(kind(str(ended)))
            return
        log.warning("%s", ended)
        # Whoever is killed may be luckier next time; whoever ends by itself, again and again, is not.
        if (ended.code or 0) > 0 and not self._tree.hub.children and self._launcher.all_aside:
            error = kind or ArmillaryError
            controller.fail(error(f"no sphere can be started: after {ended.count} tries {ended}"))

    def _sphere_changed(self, event: str, sphere: str, reason: str) -> None:
        if event == "sphere_joined":
            found = self._tree.spheres[sphere]
            self._launcher.joined(found.member.host, found.pid)
        self.controller.sphere_changed(event, sphere, reason)

    def _sphere_dismissed(self, sphere: str, at_once: bool) -> bool:
        """A sphere was told to leave by command: where it is one of the launcher's, it is not started again."""
        found = self._tree.spheres[sphere]
        return self._launcher.dismiss(found.member.host, found.pid, at_once=at_once)

    # ---- closing

    async def _end_loop(self) -> None:
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)

    def _summarize(self) -> Summary:
        if self._completed is not None and self.controller.error is None:
            return replace(self._completed, run_dir=str(self._directory.path))
        return summarize(self.controller, wall_seconds=time.monotonic() - self._began)


def train(
    task: Task | type[Task] | str,
    config: RunConfig | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Summary:
    """Train and return the summary. Raises the error that the run ended with.

    Where an event loop is running, as in a notebook, it raises ArmillaryError: ``await run(config)`` is the same there.

    ``task`` as for ``Training``; ``settings`` are keys of RunConfig (``learning_rate=0.05``), as the flags of
    ``control-cli start`` are. Call it under ``if __name__ == "__main__":`` where the task is defined in the script:
    spheres import that file too.
    """
    import uvloop

    from control.config_sources import load_config

    if os.environ.get(IN_SPHERE):
        raise TaskLoadError(
            "train() was called while a sphere imported this file for its task: "
            'put the call under if __name__ == "__main__":'
        )
    with contextlib.suppress(RuntimeError):  # none is running
        asyncio.get_running_loop()
        raise ArmillaryError(
            "train() was called where an event loop is running, as in a notebook: write `await run(config)` there, or "
            "`async with Training(config)`, both of control.training, with config = RunConfig(task=..., ...)"
        )
    name = task if isinstance(task, str) else task_spec(task)
    chosen = config or load_config({"task": name, **settings}, {})[0]
    made = None if isinstance(task, str) else task(**chosen.task_options) if isinstance(task, type) else task
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        summary = runner.run(run(chosen, callbacks=callbacks, task=made))
    if summary.error is not None:
        raise summary.error
    return summary


async def run(
    config: RunConfig,
    *,
    resume: str | None = None,
    callbacks: Sequence[Callback] = (),
    task: Task | None = None,
    verbose: bool = False,
    hold: Callable[[Summary], None] | None = None,
) -> Summary:
    """Run a training to its end and return its summary, also of one that failed. SIGINT and SIGTERM stop it in order.

    With ``hold`` a run that is over without an error or a signal is told to it, and control goes on to answer, with
    every sphere gone and all results written, until a signal comes. Raises what stands in the way of a start.
    """
    training = Training(config, task=task, resume=resume, callbacks=callbacks, verbose=verbose)
    # around all of it: a signal that comes while a run opens or closes must not leave spheres behind
    with _signals(training) as told:
        async with training:
            await training._run_to_end()
            if hold is not None and training.controller.error is None and not told.is_set():
                await training._end()
                hold(training.summary)
                await told.wait()
    return training.summary  # made on leaving, with what spheres say last


@contextlib.contextmanager
def _signals(training: Training) -> Iterator[asyncio.Event]:
    """First signal: finish the step, checkpoint, end. Second: end at once, and every sphere of the launcher.

    Yields what is set by the first.
    """
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    count = 0

    def stop(sign: signal.Signals) -> None:
        nonlocal count
        count += 1
        if count > 1:
            training.kill()
            os._exit(128 + sign)
        told.set()
        if hasattr(training, "_summary"):  # it is only held
            return
        log.warning("%s: finishing the step, then a checkpoint; once more to end at once", sign.name)
        training.stop(sign.name)

    signs: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
    try:
        for sign in signs:
            loop.add_signal_handler(sign, stop, sign)
    except (ValueError, RuntimeError):  # not the main thread: the caller's signals are the caller's
        signs = ()
    try:
        yield told
    finally:
        for sign in signs:
            loop.remove_signal_handler(sign)
