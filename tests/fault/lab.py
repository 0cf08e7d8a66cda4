"""A network on one machine: hosts are network namespaces, one process is their switch and their cables.

Linux, as root, with `ip` (Debian: iproute2) and /dev/net/tun; the kernel needs no netem. Host N has one interface,
eth0, with the address 10.77.0.N and no way out of the lab, and cannot map the memory of another host's processes.
`python tests/fault/lab.py 3` makes three hosts and takes commands from its standard input, each answered by one line;
when that ends it kills what runs on the hosts and removes them:

    slow N MS MBIT PERCENT   cable of host N, each direction: delay, rate (0: any), loss
    cut N [from|to]          nothing comes through any more, or only nothing from it, or to it
    heal N
    count N                  bytes that came through from host N, and to it

A test uses `Lab`, which starts that process.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Lab", "missing"]

TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
#: what a drop-tail queue holds, in seconds of its rate
_QUEUE_SECONDS = 0.1
#: frames taken from a host before the others have their turn
_FRAMES = 64
_PREFIX = "armillary"


def missing() -> str:
    """Return why there can be no lab here, or nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a lab of network namespaces needs Linux and root"
    if shutil.which("ip") is None:
        return "a lab of network namespaces needs the command ip: apt-get install iproute2"
    name = f"{_PREFIX}-{os.getpid()}-probe"
    try:
        os.close(os.open(TUN, os.O_RDWR))
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
    except OSError as error:
        return f"a lab of network namespaces needs {TUN}: {error}"
    except subprocess.SubprocessError as error:  # root of a container, without the right to
        return f"a lab of network namespaces cannot be made: {error}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# The process that is the switch


class Way:
    """One direction of a cable: a queue of a rate, then the loss, then the delay. Times in seconds."""

    def __init__(self) -> None:
        self.delay = self.bits_per_second = self.loss = 0.0
        self.cut = False
        self.bytes = 0
        self._free = 0.0

    def passes(self, size: int, now: float) -> float | None:
        """Return when a frame that enters now comes out, None where it does not."""
        start = max(now, self._free)
        if self.cut or start - now > _QUEUE_SECONDS:
            return None
        if self.bits_per_second:
            start += 8 * size / self.bits_per_second
        self._free = start
        if random.random() < self.loss:
            return None
        self.bytes += size
        return start + self.delay


class Host:
    def __init__(self, number: int) -> None:
        self.name = f"{_PREFIX}-{os.getpid()}-{number}"
        self.mac = bytes((0x02, 0, 10, 77, 0, number))
        self.ways = {"from": Way(), "to": Way()}
        self.tap = -1
        self._address = f"10.77.0.{number}/24"

    def make(self) -> None:
        """Make the namespace; its interface is made out here and moved, so that this process need not move."""
        self.tap = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        made = f"lab{os.getpid()}-{self.mac[-1]}"
        fcntl.ioctl(self.tap, _TUNSETIFF, struct.pack("16sH22x", made.encode(), _IFF_TAP | _IFF_NO_PI))
        _ip("netns", "add", self.name)
        _ip("link", "set", made, "netns", self.name)
        inside = ("-n", self.name)
        _ip(*inside, "link", "set", made, "name", "eth0", "address", self.mac.hex(":"))
        _ip(*inside, "address", "add", self._address, "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip(*inside, "link", "set", device, "up")


class Switch:
    """Mutable state: the cables, and the frames that are under way, by the time at which they come out."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = hosts
        self._by_mac = {host.mac: host for host in hosts}
        self._frames: list[tuple[float, int, bytes, Host, Host | None]] = []
        self._count = 0
        self._commands = b""

    def run(self) -> None:
        """Switch until standard input ends."""
        os.set_blocking(sys.stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(sys.stdin, selectors.EVENT_READ)
            for host in self.hosts:
                selector.register(host.tap, selectors.EVENT_READ, host)
            while True:
                wait = max(0.0, self._frames[0][0] - time.monotonic()) if self._frames else None
                for key, _ in selector.select(wait):
                    if key.data is not None:
                        self._take(key.data)
                    elif not self._obey():
                        return
                self._move(time.monotonic())

    def _take(self, host: Host) -> None:
        for _ in range(_FRAMES):
            try:
                frame = os.read(host.tap, 65_536)
            except BlockingIOError:
                return
            self._send(frame, host.ways["from"], time.monotonic(), host, None)

    def _send(self, frame: bytes, way: Way, now: float, sender: Host, target: Host | None) -> None:
        out = way.passes(len(frame), now)
        if out is not None:
            self._count += 1  # frames of one time keep their order
            heapq.heappush(self._frames, (out, self._count, frame, sender, target))

    def _move(self, now: float) -> None:
        while self._frames and self._frames[0][0] <= now:
            out, _, frame, sender, target = heapq.heappop(self._frames)
            if target is not None:
                with contextlib.suppress(OSError):  # a host whose interface is down
                    os.write(target.tap, frame)
                continue
            known = self._by_mac.get(frame[:6])
            everyone = [host for host in self.hosts if host is not sender] if frame[0] & 1 else []
            for receiver in everyone if known is None else [known]:
                self._send(frame, receiver.ways["to"], out, sender, receiver)

    def _obey(self) -> bool:
        data = os.read(sys.stdin.fileno(), 4096)
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            try:
                answer = self._command(*line.decode().split())
            except (ValueError, LookupError, TypeError) as error:
                answer = f"error: {line!r}: {error}"
            print(answer, flush=True)  # noqa: T201 - the answer is the output
        return bool(data)

    def _command(self, verb: str, number: str, *rest: str) -> str:
        host = self.hosts[int(number) - 1]
        if verb == "cut":
            for name in rest or host.ways:
                host.ways[name].cut = True
        elif verb == "heal":
            for way in host.ways.values():
                way.cut = False
        elif verb == "slow":
            delay, rate, loss = map(float, rest)
            for way in host.ways.values():
                way.delay, way.bits_per_second, way.loss = delay / 1e3, rate * 1e6, loss / 100
        elif verb == "count":
            return " ".join(str(way.bytes) for way in host.ways.values())
        else:
            raise ValueError("cut, heal, slow or count")
        return "done"


def _ip(*words: str) -> str:
    return subprocess.run(("ip", *words), check=True, capture_output=True, text=True, timeout=10).stdout


def _remove(name: str) -> None:
    """Kill what runs on a host, and remove it. Never fails: there may be others to remove."""
    with contextlib.suppress(subprocess.SubprocessError):
        for pid in _ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "delete", name)


def _left_over() -> Iterator[str]:
    """Yield the hosts whose switch is gone: killed, so that it could not remove them.

    One of this process's number is left over too: nothing is made yet. A probe is of a process of any kind.
    """
    for line in _ip("netns", "list").splitlines():
        prefix, _, rest = line.split()[0].partition("-")
        pid, _, number = rest.partition("-")
        if prefix == _PREFIX and pid.isdecimal():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text()
                lives = int(pid) != os.getpid() and (number == "probe" or Path(__file__).name in command)
            except OSError:
                lives = False
            if not lives:
                yield line.split()[0]


def main(count: int) -> None:
    def end(*_: Any) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    for name in list(_left_over()):
        _remove(name)
    hosts = [Host(number) for number in range(1, count + 1)]
    try:
        for host in hosts:
            host.make()
        print("hosts", *(host.name for host in hosts), flush=True)  # noqa: T201 - the answer is the output
        Switch(hosts).run()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for host in hosts:
            _remove(host.name)


# ---------------------------------------------------------------------------------------------------------------------
# What a test holds


class Lab:
    """``count`` hosts, until it is left. Raises RuntimeError where they cannot be made."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._hosts: list[str] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._keepers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Lab:
        # A session of its own: what kills a test by its process group leaves it to see the end of its input.
        self._switch = subprocess.Popen(
            [sys.executable, __file__, str(self._count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._switch.stdout is not None
        assert self._switch.stderr is not None
        _, *self._hosts = self._switch.stdout.readline().split() or [""]
        if not self._hosts:
            with self._switch:
                raise RuntimeError(f"the lab cannot be made: {self._switch.stderr.read()}")
        try:
            for host in self._hosts:
                self._keep(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _keep(self, host: str) -> None:
        """Give a host a user namespace, which lives as long as this process of it does.

        All hosts are one kernel, and what one process can open of another's below /proc is shared memory to them:
        payload would go past the network. Processes of two user namespaces cannot.
        """
        words = ("ip", "netns", "exec", host, "unshare", "--user", "--map-root-user", "sh", "-c", "echo; exec cat")
        keeper = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._keepers.append(keeper)
        assert keeper.stdout is not None
        if not keeper.stdout.readline():
            raise RuntimeError("the lab cannot be made: no user namespaces")

    @property
    def switch_pid(self) -> int:
        """The process that is the switch: a measurement may give it the cores first, and look at what it uses."""
        return self._switch.pid

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names of the namespaces."""
        return tuple(self._hosts)

    def __exit__(self, *_: object) -> None:
        for keeper in self._keepers:
            keeper.communicate()  # its input ends, and so does it
        try:
            self._switch.communicate(timeout=20)  # closes its input, and waits until all is removed
        except subprocess.TimeoutExpired:
            self._switch.kill()
            self._switch.communicate()
        for process in self._processes:
            process.kill()
            process.communicate()

    def kill(self) -> None:
        """Kill the switch, as a fault: the hosts stay behind, without a network."""
        self._switch.kill()
        self._switch.wait()

    def tell(self, command: str) -> str:
        """Give a command to the switch; return its answer once it holds."""
        assert self._switch.stdin is not None
        assert self._switch.stdout is not None
        self._switch.stdin.write(command + "\n")
        self._switch.stdin.flush()
        answer = self._switch.stdout.readline().strip()
        if not answer or answer.startswith("error"):
            raise RuntimeError(f"{command}: {answer or 'the switch is gone'}")
        return answer

    def start(self, host: int, words: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command on a host; it is killed with the lab."""
        inside = ["nsenter", "--user", "--target", str(self._keepers[host - 1].pid), "--"]
        command = ["ip", "netns", "exec", self._hosts[host - 1], *inside, *words]
        process = subprocess.Popen(command, text=True, start_new_session=True, **options)
        self._processes.append(process)
        return process


if __name__ == "__main__":
    main(int(sys.argv[1]))
