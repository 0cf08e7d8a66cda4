"""The launcher ``ray``: each sphere is an actor on a Ray cluster that is there: the extra ``ray`` of the package.

Where actors run, and that they run again when their process or their node is gone, is Ray's work; here it is counted,
so that one whose process dies again and again is named. A sphere that ends by itself is started again here, as a local
one. A cluster that is gone takes its actors along, and nothing else. Bytes of the training go over the spheres' own
gRPC, never through Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any

from control.config import RunConfig
from control.lives import Lives, Outcome, RunFacts, Started
from control.ray_actor import SphereActor, sentence
from control.restarts import Restarts
from spheres import SINGLE_THREAD
from spheres.errors import ConfigError, UnreachableError
from spheres.exposure import is_every_address, is_loopback
from spheres.task import IN_SPHERE

__all__ = ["RaySpheres", "ray_launcher"]

log = logging.getLogger(__name__)

#: of the actors' processes, before they import anything
_VARIABLES = {**SINGLE_THREAD, "GRPC_VERBOSITY": "NONE", IN_SPHERE: "1"}
#: seconds within which the head of a cluster must answer: Ray itself would try for two minutes
_CONNECT_SECONDS = 5.0
#: seconds after which an actor without a place is spoken of
_PLACE_SECONDS = 10.0
#: seconds between two looks at whether the cluster's head is there
_HEAD_SECONDS = 5.0
#: seconds for a farewell to a cluster: one that is gone never answers
_FAREWELL_SECONDS = 5.0
#: what says after how long without the head Ray's core ends this process, and with it the whole run: after a minute by
#: default. But other spheres may train on, and there is a checkpoint to be saved.
_RECONNECT, _RECONNECT_SECONDS = "RAY_gcs_rpc_server_reconnect_timeout_s", 30 * 24 * 3600
#: seconds between the end of an actor's process and the question where it is now
_PAUSE = 0.5


def ray_launcher(config: RunConfig) -> Callable[[RunFacts], RaySpheres]:
    """Connect to the cluster and return what makes the launcher. A connection that this process has is used.

    Raises ConfigError without the extra, or where spheres could not reach control; UnreachableError without a cluster.
    """
    # the cluster's owner may want them; a run has nothing to tell anybody
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(_RECONNECT, str(_RECONNECT_SECONDS))
    try:
        import ray
    except ImportError:
        raise ConfigError("the launcher ray needs the extra ray: pip install 'armillary[ray]'") from None
    connected = not ray.is_initialized()
    if connected:
        _connect(ray, config.ray_address)
    try:
        _refuse_loopback(config.listen, ray.nodes())
    except ConfigError:
        if connected:
            ray.shutdown()
        raise
    return lambda facts: RaySpheres(ray, facts, connected=connected)


def _connect(ray: Any, address: str) -> None:
    where = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    host, _, port = where.rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        # that it takes no signals in this thread is as it should be
        with _silence(logging.getLogger("ray")), _our_handler(signal.SIGTERM):
            ray.init(address=where, log_to_driver=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: its own words for an address in RAY_ADDRESS
        if where == "auto":
            reason = (
                "there is no Ray cluster on this machine: start one with `ray start --head`, or join one with "
                "`ray start --address HOST:PORT`, or name its head with --ray-address HOST:PORT"
            )
        else:
            reason = f"no Ray cluster answers at {where} (--ray-address): {sentence(error)}"
        raise UnreachableError(reason) from error


@contextlib.contextmanager
def _silence(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _our_handler(sign: signal.Signals) -> Iterator[None]:
    """Keep the process's own handler of a signal, whatever is put over it meanwhile, and in whichever thread.

    Ray's core sets one for SIGTERM, below Python, that says where the process is and aborts it after 3 s: long before
    the step in hand and a checkpoint are done.
    """
    libc, kept = ctypes.CDLL(None), ctypes.create_string_buffer(1024)  # more than any system's struct sigaction
    libc.sigaction(int(sign), None, kept)
    try:
        yield
    finally:
        libc.sigaction(int(sign), kept, None)


def _refuse_loopback(listen: str, nodes: Iterable[Mapping[str, Any]]) -> None:
    """Raise ConfigError where control listens for this machine alone, and the cluster has others."""
    others = sorted({n["NodeManagerHostname"] for n in nodes if n["Alive"]} - {socket.gethostname()})
    if others and is_loopback(listen.rpartition(":")[0]):
        raise ConfigError(
            f"control listens on {listen}, which spheres on {', '.join(others[:3])} cannot reach: "
            "give --listen 0.0.0.0:7070 (or this node's address) and --insecure"
        )


class _Life:
    """One actor, over all the processes that Ray gives it.

    Mutable state: where it is now, when it joined there, and what its processes so far have cost.
    """

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self.actor = ray, actor
        self.since = time.monotonic()
        self.where: tuple[str, int] | None = None
        self.joined: float | None = None
        self.restarts = Restarts()
        self.over = False
        self._end = actor.run.remote()

    async def look(self) -> bool:
        """Ask where it is; waits until Ray has placed it. Returns whether its process before has died."""
        try:
            where = tuple(await self.actor.where.remote())
        except self._ray.exceptions.RayError:
            return False
        before, self.where = self.where, where
        if before in (None, where):
            return False
        now = time.monotonic()
        # as of local ones: what it took to load the task is no life
        self.restarts.ended(now, lived=0.0 if self.joined is None else now - self.joined)
        self.restarts.started()
        self.joined = None
        return True

    async def gone(self) -> None:
        """Wait until the process that it is in has died."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            await self.actor.stay.options(max_task_retries=0).remote()

    async def wait(self) -> Outcome:
        try:
            return Outcome(*(await self._end))
        except self._ray.exceptions.RuntimeEnvSetupError as error:
            return Outcome(1, sentence(error))
        except self._ray.exceptions.RayActorError as error:
            # an actor that could not even be made fails by itself; else somebody has killed it for good
            made = self.where is not None
            return Outcome(None if made else 1, sentence(error))
        except self._ray.exceptions.RayError as error:
            return Outcome(1, sentence(error))
        finally:
            self.over = True
            self.end(at_once=True)

    def end(self, *, at_once: bool) -> None:
        if not self._ray.is_initialized():  # it would connect anew
            return
        # in a thread that nobody waits for: where the cluster is gone, Ray does not return
        threading.Thread(target=self._kill if at_once else self._leave, daemon=True).start()

    def _kill(self) -> None:
        self._ray.kill(self.actor, no_restart=True)

    def _leave(self) -> None:
        self.actor.leave.options(max_task_retries=0).remote()


class RaySpheres:
    """Mutable state: the lives of the actors, and the questions where they are.

    Actors belong to this process's connection: where control is killed, Ray ends them.
    """

    def __init__(self, ray: Any, facts: RunFacts, *, connected: bool) -> None:
        """``connected``: the connection to Ray was made for this run, and ends with it."""
        self._ray, self._facts, self._connected = ray, facts, connected
        self._lives = Lives("ray", self._launch, log_of=self._log_of, ended=facts.ended)
        self._latest: dict[int, _Life] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._head = str(ray.get_runtime_context().gcs_address)
        self._gone_since: float | None = None
        self._watching: asyncio.Task[None] | None = None
        self.dismiss, self.expect_end, self.kill = self._lives.dismiss, self._lives.expect_end, self._lives.kill

    @property
    def living(self) -> int:
        return self._lives.living

    @property
    def all_aside(self) -> bool:
        return self._lives.all_aside

    def aside(self) -> list[tuple[str, str]]:
        """Return also the head where it is gone, those that Ray has no place for, and whose processes keep dying."""
        now = time.monotonic()
        since = self._gone_since
        head = [] if since is None else [("ray", self._gone(now - since))]
        waiting = [
            (
                f"ray-{number}",
                f"waits since {now - life.since:.3g} s for Ray to place it: it needs 1 CPU; see `ray status`",
            )
            for number, life in self._latest.items()
            if life.where is None and not life.over and now - life.since > _PLACE_SECONDS
        ]
        dying = [
            (f"ray-{number}", _dies(life, now))
            for number, life in self._latest.items()
            if life.restarts.aside and life.joined is None and life.where is not None and not life.over
        ]
        return [*head, *self._lives.aside(), *waiting, *dying]

    async def begin(self, count: int, *, came_back: bool) -> None:
        """Start spheres; those of a control before have ended with it."""
        await self.start(count)

    async def start(self, count: int) -> list[Started]:
        """Ask Ray for ``count`` more.

        Raises ConfigError where they could not reach control, UnreachableError where the cluster is gone.
        """
        await self._check_head()
        if self._watching is None:
            self._watching = self._ask(self._watch_head())
        _refuse_loopback(self._facts.address, await asyncio.to_thread(self._ray.nodes))
        return await self._lives.start(count)

    def joined(self, host: str, pid: int) -> None:
        """Somebody has joined: where it is none that is known, an actor may be in another process by now."""
        if not self._note(host, pid):
            self._ask(self._find(host, pid))

    def _note(self, host: str, pid: int) -> bool:
        for life in self._latest.values():
            if life.where == (host, pid) and life.joined is None:
                life.joined = time.monotonic()
        return self._lives.joined(host, pid)

    async def _find(self, host: str, pid: int) -> None:
        lives = [(number, life) for number, life in self._latest.items() if not life.over]
        await asyncio.gather(*(self._look(number, life) for number, life in lives))
        self._note(host, pid)

    async def _look(self, number: int, life: _Life) -> None:
        aside = life.restarts.aside
        if await life.look() and life.restarts.aside:
            count = life.restarts.count
            if not aside or count & (count - 1) == 0:  # then at 8, 16, 32 ...: Ray starts it again at once
                why = _dies(life, time.monotonic())
                log.warning("ray sphere %d: %s; its log is %s", number, why, self._log_of(number))

    async def _follow(self, number: int, life: _Life) -> None:
        """Know where an actor is, in whichever process, until it is over."""
        while not life.over:
            await self._look(number, life)
            await life.gone()
            await asyncio.sleep(_PAUSE)

    def _ask(self, question: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(question)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return task

    async def _launch(self, number: int) -> _Life:
        await self._check_head()
        life = self._latest[number] = await asyncio.to_thread(self._made)
        self._ask(self._follow(number, life))
        return life

    async def _head_answers(self) -> bool:
        """Whether anybody listens there. Ray itself, asked, would wait for the head, and its thread with it."""
        host, _, port = self._head.rpartition(":")
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except OSError:  # a TimeoutError is one
            return False
        writer.close()
        return True

    async def _check_head(self) -> None:
        """Raise UnreachableError where the head of the cluster is gone."""
        if not await self._head_answers():
            raise UnreachableError(f"the head of the Ray cluster at {self._head} is gone: no sphere can be started")

    async def _watch_head(self) -> None:
        while True:
            await asyncio.sleep(_HEAD_SECONDS)
            answers = await self._head_answers()
            if not answers and self._gone_since is None:
                self._gone_since = time.monotonic()
                log.warning(
                    "the head of the Ray cluster at %s is gone, and its actors with it: the run goes on with other "
                    "spheres, or waits for some; on another cluster: end it, and start it with --resume",
                    self._head,
                )
            elif answers and self._gone_since is not None:
                self._gone_since = None
                log.info("the head of the Ray cluster at %s answers again", self._head)

    def _gone(self, seconds: float) -> str:
        return f"the head of the cluster at {self._head} is gone since {seconds:.3g} s: no sphere can be started"

    def _made(self) -> _Life:
        facts = self._facts
        host, _, port = facts.address.rpartition(":")
        if is_every_address(host):
            ip = self._ray.util.get_node_ip_address()
            host = f"[{ip}]" if ":" in ip else ip
        variables = dict(_VARIABLES)
        if facts.path:
            variables["PYTHONPATH"] = os.pathsep.join([*facts.path, "${PYTHONPATH}"])
        actor = (
            self._ray.remote(SphereActor)
            .options(
                num_cpus=1,
                max_restarts=-1,
                max_task_retries=-1,
                max_concurrency=4,  # run, where, stay, leave
                runtime_env={"env_vars": variables},
            )
            .remote(
                f"{host}:{port}",
                facts.orphan_timeout,
                loopback=is_loopback(facts.address.rpartition(":")[0]),
                verbose=facts.verbose,
            )
        )
        return _Life(self._ray, actor)

    def _log_of(self, number: int) -> str:
        return f"with Ray: ray logs actor --id {self._latest[number].actor._actor_id.hex()}"

    async def aclose(self) -> None:
        """End what still lives, and the connection to Ray where it was made for this run."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        # a thread that nobody waits for long: a cluster that is gone does not answer
        farewell = threading.Thread(target=self._ray.shutdown, daemon=True)
        if self._connected and self._gone_since is not None:
            farewell.start()  # there is nobody to be told, and with the connection all that waits for them ends
        await self._lives.aclose()
        if self._connected:
            if farewell.ident is None:
                farewell.start()
            await asyncio.to_thread(farewell.join, _FAREWELL_SECONDS)


def _dies(life: _Life, now: float) -> str:
    """Say that an actor's processes keep dying."""
    count, since = life.restarts.count, now - life.restarts.since
    return f"its process has died {count} times in {since:.3g} s; Ray starts it again each time"
