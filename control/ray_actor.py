"""A sphere as an actor of a Ray cluster: what runs there, in a process of Ray's."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable
from functools import partial

from spheres.errors import ArmillaryError, GradientError, TaskLoadError
from spheres.exposure import insecure_warning

__all__ = ["SphereActor", "sentence"]

log = logging.getLogger(__name__)


class SphereActor:
    """One sphere in an actor's process. Ray calls each method in a thread of its own."""

    def __init__(self, control: str, orphan_timeout: float, *, loopback: bool, verbose: bool) -> None:
        self._control, self._orphan_timeout, self._loopback = control, orphan_timeout, loopback
        self._verbose = verbose
        self._leave: Callable[[], object] = lambda: None

    def where(self) -> tuple[str, int]:
        """Return what the sphere tells control of itself."""
        return socket.gethostname(), os.getpid()

    def stay(self) -> None:
        """Return never: whoever waits for it learns that this process is gone."""
        threading.Event().wait()

    def leave(self) -> None:
        """Let the sphere finish its step, and end."""
        self._leave()

    def run(self) -> tuple[int, str]:
        """Be a sphere until it ends. Returns the exit code of the command, and the error. Again in a later process."""
        import ray

        from spheres.cli import LogTail

        tail = LogTail()
        level = logging.DEBUG if self._verbose else logging.INFO
        logging.basicConfig(
            level=level,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            handlers=[logging.StreamHandler(), tail],
            force=True,  # Ray has set up its own
        )
        try:
            self._run("127.0.0.1" if self._loopback else ray.util.get_node_ip_address(), tail.last)
        except ArmillaryError as error:
            if self._verbose or isinstance(error, GradientError | TaskLoadError):
                log.error("%s", error, exc_info=error)
            return error.exit_code, sentence(error)
        except Exception as error:
            log.exception("not expected")
            return 1, f"{type(error).__name__}: {sentence(error)} (not expected)"
        return 0, ""

    def _run(self, host: str, lines: Callable[[int], list[str]]) -> None:
        import uvloop

        from spheres.environment import allow_many_files, tune_malloc
        from spheres.grpc_link import GrpcTransport
        from spheres.server import Health, add_services
        from spheres.sphere import Sphere, SphereOptions
        from spheres.worker import limit_threads

        tune_malloc()
        allow_many_files()
        limit_threads()
        listen = f"[{host}]:0" if ":" in host else f"{host}:0"
        if not self._loopback:
            log.warning("%s", insecure_warning(listen))
        options = SphereOptions(control=self._control, listen=listen, orphan_timeout=self._orphan_timeout)

        async def main() -> None:
            health = Health()
            transport = GrpcTransport(lambda server: add_services(server, health))
            sphere = Sphere(options, transport, log_lines=lines, link_changed=health.set_ready)
            loop = asyncio.get_running_loop()
            self._leave = partial(loop.call_soon_threadsafe, sphere.drain, "told to leave by the launcher")
            log.info("looking for control at %s, for up to %g s", options.control, options.orphan_timeout)
            await sphere.run()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())


def sentence(error: BaseException) -> str:
    """Return what an error says in one line; of a traceback as text its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
