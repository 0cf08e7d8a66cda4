"""The ``sphere`` command: one process, one sphere; and a question to any node, whether it is well."""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

from spheres import set_environment
from spheres.errors import ArmillaryError, ConfigError, GradientError, TaskLoadError, UnreachableError
from spheres.exposure import insecure_warning, is_address, is_loopback
from spheres.logs import VARIABLE, JsonFormatter, formatter, is_json, json_asked
from spheres.units import parse_duration
from spheres.words import cut, is_encodable

__all__ = ["LogTail", "main", "make_parser"]

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

EXIT_CODES = """exit codes: 0 the run is over, or told to go; 1 any other error; 2 wrong flags or a port in use;
3 the task cannot be loaded or its data are missing; 5 control or the run refused, or nobody answered for
--orphan-timeout; 130 Ctrl+C. Of the environment: ARMILLARY_CONTROL, ARMILLARY_LISTEN, ARMILLARY_ADVERTISE,
ARMILLARY_ZONE, ARMILLARY_RELAY, ARMILLARY_ORPHAN_TIMEOUT, ARMILLARY_HOLD, ARMILLARY_INSECURE, ARMILLARY_LOG_FORMAT; a
flag goes before it. See docs/cli.md."""

#: of one line that is kept for `control-cli logs`
_MOST_LINE_BYTES = 16 * 1024
#: seconds that a sphere which is told to end at once has for its links
_END_SECONDS = 1.0


class LogTail(logging.Handler):
    """Keeps the last lines of the log, for ``control-cli logs``."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=1_000)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines += [cut(line, _MOST_LINE_BYTES) for line in self.format(record).splitlines()]
        except Exception:  # noqa: BLE001 - a log call never raises into who makes it
            self.handleError(record)

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
    """Errors in one line, as ``control-cli`` has them; with JSON the one line of the log."""

    def error(self, message: str) -> NoReturn:
        line = f"{message}; see `{self.prog} --help`"
        if not json_asked(sys.argv[1:]):
            self.exit(2, f"error: {line}\n")
        sys.stdout.write(JsonFormatter().format(log.makeRecord(log.name, logging.ERROR, "", 0, line, (), None)) + "\n")
        self.exit(2)


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
        default=environ("ARMILLARY_LISTEN") or "127.0.0.1:0",
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
    start.add_argument("--zone", default=environ("ARMILLARY_ZONE", ""), type=_text, help="for placement")
    start.add_argument(
        "--host", default="", type=_text, help="this machine's name, for placement (default: its host name)"
    )
    start.add_argument(
        "--relay",
        action="store_true",
        default=_is_on("ARMILLARY_RELAY"),
        help="sum and pass on only",
    )
    start.add_argument(
        "--orphan-timeout",
        default=environ("ARMILLARY_ORPHAN_TIMEOUT") or "60s",
        type=_seconds,
        metavar="TIME",
        help="end after so long without control (60s)",
    )
    start.add_argument(
        "--hold",
        action="store_true",
        default=_is_on("ARMILLARY_HOLD"),
        help="stay when the run is over or control is gone, and take part again once there is something to do",
    )
    start.add_argument(
        "--insecure",
        action="store_true",
        default=_is_on("ARMILLARY_INSECURE"),
        help="allow --listen beyond loopback, without certificates",
    )
    start.add_argument(
        "--log-format",
        default=environ(VARIABLE, ""),
        metavar="text|json",
        help="log lines for people, or one JSON object a line",
    )
    start.add_argument("-v", "--verbose", action="store_true", help="log more, and tracebacks")
    health = commands.add_parser(
        "health",
        help="ask a node, control or a sphere, whether it is well",
        epilog="exit code 0: it answers that it serves; 1: it does not, or nobody answers.",
    )
    listen = environ("ARMILLARY_LISTEN")
    health.add_argument(
        "address",
        nargs="?" if listen else None,
        default=listen,
        type=_address,
        metavar="HOST:PORT",
        help="where it listens (default: ARMILLARY_LISTEN, on this machine)",
    )
    health.add_argument("--service", default="", help="'' (default): it lives; ready: it takes part")
    health.add_argument(
        "--timeout", default="3s", type=_seconds, metavar="TIME", help="for how long to wait for an answer (3s)"
    )
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    # Before anything else: the first process of a container gets no signal that it has no handler for.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # held back while a sphere began anew
    options = make_parser().parse_args(words)
    _end(_health(options) if options.command == "health" else _started(options))


def _end(code: int) -> NoReturn:
    """End the process, though a thread may be deep in a task's code: there is nothing left that it could harm."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def _started(options: argparse.Namespace) -> int:
    """Run a sphere and return its exit code; what it ends with is the last line of its log."""
    json, tail = False, LogTail()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name that is no UTF-8 must not cost its line
    try:
        json, names = is_json(options.log_format), dict[str, str]()
        handlers = [logging.StreamHandler(sys.stdout), tail]
        for handler in handlers:
            text = "%(asctime)s %(levelname)s %(name)s: %(message)s"
            handler.setFormatter(formatter(options.log_format, text, lambda: names))
        logging.basicConfig(level=logging.DEBUG if options.verbose else logging.INFO, handlers=handlers)
        return _start(options, tail, names)
    except ArmillaryError as error:
        message, code = " ".join(str(error).split()), error.exit_code
        # what a task raised is only to be found here: on other machines there is no more than its sentence
        trace = error if options.verbose or isinstance(error, GradientError | TaskLoadError) else None
        if json or trace:
            log.error("%s", message, exc_info=trace)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message, code = f"{type(error).__name__}: {error} (not expected)", 1
        log.exception("%s", message)
    if not json:
        sys.stdout.flush()
        sys.stderr.write(f"error: {message}\n")
    return code


def _health(options: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    host, _, port = options.address.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # whoever listens on all can be asked here
    address = f"{host}:{port}"
    name = f"{address} {options.service}".rstrip()
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        request = health_pb2.HealthCheckRequest(service=options.service)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=options.timeout)
        except grpc.RpcError as error:
            said = " ".join((error.details() or "").split())
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                said = f"nobody answers ({said})"
            sys.stdout.write(f"{name}: {said}\n")
            return 1
    sys.stdout.write(f"{name}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}\n")
    return int(answer.status != health_pb2.HealthCheckResponse.SERVING)


def _start(options: argparse.Namespace, tail: LogTail, names: dict[str, str]) -> int:
    set_environment()
    import uvloop

    from spheres.environment import allow_many_files, tune_malloc
    from spheres.task import IN_SPHERE
    from spheres.worker import limit_threads

    if options.listen and not is_loopback(options.listen.rpartition(":")[0]):
        if not options.insecure:
            raise ConfigError(f"--listen {options.listen} is beyond loopback: nothing is encrypted; add --insecure")
        log.warning("%s", insecure_warning(options.listen))
    os.environ[IN_SPHERE] = "1"
    tune_malloc()
    allow_many_files()
    limit_threads()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        anew = runner.run(_take_part(options, tail, names))
    if anew:
        _begin_anew()
    return 0


def _begin_anew() -> NoReturn:
    """Be the same command again in this process, with nothing imported, cached or allocated."""
    logging.shutdown()
    sys.stdout.flush()
    # as long as there is no handler, the first process of a container would not get them
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


async def _take_part(options: argparse.Namespace, tail: LogTail, names: dict[str, str]) -> bool:
    """Be a sphere until the run is over, or a signal comes; at the second signal end at once.

    Returns whether it is to begin anew.
    """
    from spheres.grpc_link import GrpcTransport
    from spheres.server import Health, add_services
    from spheres.sphere import Sphere, SphereOptions

    health = Health()

    def link_changed(up: bool) -> None:
        if up and sphere.hub is not None:
            names.update(sphere_id=sphere.hub.id, run_id=sphere.hub.config.run_id)
        health.set_ready(up)

    sphere_options = SphereOptions(
        control=options.control,
        listen=options.listen,
        advertise=options.advertise,
        zone=options.zone,
        relay=options.relay,
        orphan_timeout=options.orphan_timeout,
        hold=options.hold,
        host=options.host,
    )
    transport = GrpcTransport(lambda server: add_services(server, health))
    sphere = Sphere(sphere_options, transport, log_lines=tail.last, link_changed=link_changed)
    told = False

    def stop() -> None:
        nonlocal told
        if sphere.hub is None:
            # Nobody counts on it yet; the thread that loads the task would be waited for.
            log.info("a signal before this sphere takes part: it ends")
            _end(0)
        if told:
            sphere.stop()
            loop.call_later(_END_SECONDS, _end, 0)  # whatever a thread is at, or a link waits for
        else:
            sphere.drain("a signal; once more to end at once")
        told = True

    loop = asyncio.get_running_loop()
    for sign in _SIGNALS:
        loop.add_signal_handler(sign, stop)
    log.info("looking for control at %s, for up to %g s", options.control, options.orphan_timeout)
    try:
        await sphere.run()
    except UnreachableError:
        if not told:  # to go, before it had found control
            raise
    return sphere.anew


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _text(text: str) -> str:
    if not is_encodable(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no UTF-8")
    return text


def _address(text: str) -> str:
    if not is_address(_text(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no address; give HOST:PORT, such as 127.0.0.1:5000")
    return text


def _address_or_none(text: str) -> str:
    return _address(text) if text else ""


def _seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
