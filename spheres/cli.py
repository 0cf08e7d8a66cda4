"""The ``sphere`` command: one process, one sphere."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys

from spheres.errors import ArmillaryError, GradientError

__all__ = ["main"]

EXIT_CODES = """exit codes: 0 the run is over, or told to go; 2 wrong flags or a port in use; 3 the task cannot
be loaded or its data are missing; 5 control or the run refused, or nobody answered for --orphan-timeout"""


def main() -> None:
    """Run the command line; ends the process with its exit code."""
    parser = argparse.ArgumentParser(prog="sphere", description="One node of a training tree.", epilog=EXIT_CODES)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="enroll with control and take part until the run is over")
    start.add_argument("--control", required=True, metavar="HOST:PORT", help="address of control")
    start.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="where children dial; '' for none")
    start.add_argument("--advertise", default="", metavar="HOST:PORT", help="the same, as children see it")
    start.add_argument("--zone", default="", help="for placement")
    start.add_argument("--host", default="", help="this machine's name, for placement (default: its host name)")
    start.add_argument("--relay", action="store_true", help="sum and pass on only")
    start.add_argument("--orphan-timeout", default="60s", type=_seconds, help="end after so long without control")
    start.add_argument("--insecure", action="store_true", help="allow --listen beyond loopback, without certificates")
    start.add_argument("-v", "--verbose", action="store_true", help="log more, and tracebacks")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        code = _start(options)
    except ArmillaryError as error:
        if options.verbose or isinstance(error, GradientError):
            logging.getLogger(__name__).error("%s", error, exc_info=error)
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    logging.shutdown()
    # The compute thread may be deep in a task's code: there is nothing left that it could harm.
    sys.stdout.flush()
    os._exit(code)


def _start(options: argparse.Namespace) -> int:
    # Read once, when numpy is first imported: bits differ between one BLAS thread and two.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ[name] = "1"
    import uvloop

    from spheres.environment import tune_malloc
    from spheres.errors import ConfigError
    from spheres.grpc_link import GrpcTransport
    from spheres.sphere import Sphere, SphereOptions
    from spheres.worker import limit_threads

    host = options.listen.rpartition(":")[0].strip("[]")
    if host not in ("", "127.0.0.1", "localhost", "::1") and not options.insecure:
        raise ConfigError(f"--listen {options.listen} is beyond loopback: nothing is encrypted; add --insecure")
    tune_malloc()
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
        sphere = Sphere(sphere_options, GrpcTransport())
        loop = asyncio.get_running_loop()
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, sphere.stop)
        await sphere.run()

    limit_threads()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    return 0


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
