"""The ``sphere`` command: one process, one sphere."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

from spheres.errors import ArmillaryError, ConfigError, GradientError, TaskLoadError, UnreachableError

__all__ = ["main", "make_parser"]

log = logging.getLogger(__name__)

EXIT_CODES = """exit codes: 0 the run is over, or told to go; 1 any other error; 2 wrong flags or a port in use;
3 the task cannot be loaded or its data are missing; 5 control or the run refused, or nobody answered for
--orphan-timeout; 130 Ctrl+C. Of the environment: ARMILLARY_CONTROL, ARMILLARY_ADVERTISE, ARMILLARY_ZONE,
ARMILLARY_RELAY; a flag goes before it. See docs/cli.md."""

#: read once, when numpy is first imported
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class _LogTail(logging.Handler):
    """Keeps the last lines of the log, for ``control-cli logs``."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=1_000)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines += self.format(record).splitlines()

    def last(self, count: int) -> list[str]:
        """Return up to ``count`` lines, the latest last, of 256 KiB at most."""
        lines: list[str] = []
        room = 256 * 1024
        for line in list(self._lines)[: -count - 1 : -1]:
            room -= len(line.encode()) + 4
            if room < 0:
                break
            lines.append(line)
        return lines[::-1]


class _Parser(argparse.ArgumentParser):
    """Errors in one line, as ``control-cli`` has them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        sys.stdout.write(f"sphere {version('armillary')}\n")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    environ = os.environ.get
    parser = _Parser(prog="sphere", description="One node of a training tree.", epilog=EXIT_CODES)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    start = commands.add_parser("start", help="enroll with control and take part until the run is over")
    start.epilog = EXIT_CODES
    control = environ("ARMILLARY_CONTROL")
    start.add_argument(
        "--control",
        required=not control,
        default=control,
        type=_address,
        metavar="HOST:PORT",
        help="address of control",
    )
    start.add_argument(
        "--listen",
        default="127.0.0.1:0",
        type=_address_or_none,
        metavar="HOST:PORT",
        help="where children dial; '' for none",
    )
    start.add_argument(
        "--advertise",
        default=environ("ARMILLARY_ADVERTISE", ""),
        type=_address_or_none,
        metavar="HOST:PORT",
        help="the same, as children see it",
    )
    start.add_argument("--zone", default=environ("ARMILLARY_ZONE", ""), help="for placement")
    start.add_argument("--host", default="", help="this machine's name, for placement (default: its host name)")
    start.add_argument(
        "--relay",
        action="store_true",
        default=environ("ARMILLARY_RELAY", "").lower() in ("1", "true", "yes", "on"),
        help="sum and pass on only",
    )
    start.add_argument(
        "--orphan-timeout", default="60s", type=_seconds, metavar="TIME", help="end after so long without control (60s)"
    )
    start.add_argument("--insecure", action="store_true", help="allow --listen beyond loopback, without certificates")
    start.add_argument("-v", "--verbose", action="store_true", help="log more, and tracebacks")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    options = make_parser().parse_args(words)
    tail = _LogTail()
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[logging.StreamHandler(), tail],
    )
    try:
        code = _start(options, tail)
    except ArmillaryError as error:
        # what a task raised is only to be found here: on other machines there is no more than its sentence
        if options.verbose or isinstance(error, GradientError | TaskLoadError):
            log.error("%s", error, exc_info=error)
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        log.exception("not expected")
        sys.stderr.write(f"error: {type(error).__name__}: {error} (not expected)\n")
        code = 1
    logging.shutdown()
    # The compute thread may be deep in a task's code: there is nothing left that it could harm.
    sys.stdout.flush()
    os._exit(code)


def _start(options: argparse.Namespace, tail: _LogTail) -> int:
    for name in _THREADS:  # bits differ between one BLAS thread and two
        os.environ[name] = "1"
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it logs by itself, its errors say too
    import uvloop

    from spheres.environment import allow_many_files, tune_malloc
    from spheres.grpc_link import GrpcTransport
    from spheres.sphere import Sphere, SphereOptions
    from spheres.task import IN_SPHERE
    from spheres.worker import limit_threads

    host = options.listen.rpartition(":")[0].strip("[]")
    if host not in ("", "127.0.0.1", "localhost", "::1") and not options.insecure:
        raise ConfigError(f"--listen {options.listen} is beyond loopback: nothing is encrypted; add --insecure")
    os.environ[IN_SPHERE] = "1"
    tune_malloc()
    allow_many_files()
    sphere_options = SphereOptions(
        control=options.control,
        listen=options.listen,
        advertise=options.advertise,
        zone=options.zone,
        relay=options.relay,
        orphan_timeout=options.orphan_timeout,
        host=options.host,
    )

    async def run() -> None:
        sphere = Sphere(sphere_options, GrpcTransport(), log_lines=tail.last)
        told = False

        def stop() -> None:
            nonlocal told
            if told:
                sphere.stop()
            else:
                sphere.drain("a signal; once more to end at once")
            told = True

        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, stop)
        log.info("looking for control at %s, for up to %g s", options.control, options.orphan_timeout)
        try:
            await sphere.run()
        except UnreachableError:
            if not told:  # to go, before it had found control
                raise

    limit_threads()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    return 0


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no address; give HOST:PORT, such as 127.0.0.1:5000")
    return text


def _address_or_none(text: str) -> str:
    return _address(text) if text else ""


def _seconds(text: str) -> float:
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
    for unit in sorted(units, key=len, reverse=True):
        if text.endswith(unit):
            text, factor = text.removesuffix(unit), units[unit]
            break
    else:
        factor = 1.0
    try:
        value = float(text) * factor
    except ValueError:
        raise argparse.ArgumentTypeError("give a duration such as 60s, 5m or 0.5s") from None
    if value < 0:
        raise argparse.ArgumentTypeError("a duration is not negative")
    return value
