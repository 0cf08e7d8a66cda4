"""Containers for tests, by podman's own command: each with its own address on a network that leads nowhere."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Container", "Engine", "podman"]

#: seconds in which a container has to do what it is asked, on a machine that has other things to do
SECONDS = 180.0
#: as anybody should run them: nothing of the image can be written, no privileges, and no way to get any
HARDENED = (
    *("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--cap-drop", "all"),
    *("--security-opt", "no-new-privileges"),
)


def podman(*words: str, check: bool = True, timeout: float = SECONDS) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(("podman", *words), capture_output=True, text=True, timeout=timeout, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"podman {' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done


@dataclass
class Container:
    """A container that was started, and the JSON lines that it has said until now."""

    name: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    #: what it said that was no JSON
    noise: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._news = threading.Condition()
        self._ended = False
        command = ("podman", "logs", "--follow", self.name)
        self._logs = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._logs.stdout is not None
        for line in self._logs.stdout:
            with self._news:
                try:
                    self.lines.append(json.loads(line))
                except ValueError:
                    self.noise.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def until(self, wanted: Callable[[dict[str, Any]], bool], *, timeout: float = SECONDS) -> dict[str, Any]:
        """Wait for a line, also one of before; fail where it ends without one."""

        def found() -> dict[str, Any] | None:
            return next((line for line in reversed(self.lines) if wanted(line)), None)

        with self._news:
            in_time = self._news.wait_for(lambda: found() or self._ended, timeout)
            line = found()
        said = "\n".join([*map(str, self.lines[-5:]), *self.noise[-20:]])
        assert line is not None, (
            f"{self.name} {'ended' if in_time else f'said nothing of that in {timeout} s'}:\n{said}"
        )
        return line

    def until_step(self, step: int) -> int:
        return int(self.until(lambda line: line.get("event") == "step" and line["step"] >= step)["step"])

    @property
    def step(self) -> int:
        return max((line["step"] for line in list(self.lines) if line.get("event") == "step"), default=0)

    def ask(self, *words: str, check: bool = True) -> str:
        """Run a command inside and return what it prints."""
        return podman("exec", self.name, *words, check=check).stdout

    def wait(self, timeout: float = SECONDS) -> int:
        """Wait for its end, and all it has said; return its exit code."""
        code = int(podman("wait", self.name, timeout=timeout).stdout)
        self.until_end(timeout)
        return code

    def until_end(self, timeout: float = SECONDS) -> None:
        """Wait for the end of its process, and all it has said; it may be started again."""
        self._logs.wait(timeout)
        self._reader.join(timeout)

    def close(self) -> None:
        podman("rm", "--force", "--time", "0", "--volumes", self.name, check=False)
        self._logs.kill()
        self._logs.communicate()


class Engine:
    """Makes containers of one image on one internal network, and removes all of it. Names begin with ``prefix``."""

    def __init__(self, prefix: str, image: str) -> None:
        self.prefix, self.image = prefix, image
        self.containers: dict[str, Container] = {}
        self._volumes: list[str] = []

    def __enter__(self) -> Engine:
        podman("network", "create", "--internal", self.prefix)
        return self

    def __exit__(self, *_: object) -> None:
        for container in self.containers.values():
            container.close()
        for volume in self._volumes:
            podman("volume", "rm", "--force", volume, check=False)
        podman("network", "rm", "--force", self.prefix, check=False)

    def volume(self, name: str) -> str:
        made = f"{self.prefix}-{name}"
        self._volumes.append(made)
        return made

    def start(self, name: str, *command: str, volume: str | None = None, **environment: str) -> Container:
        """Start a container; others reach it by its name."""
        words = ["run", "--detach", "--name", f"{self.prefix}-{name}", "--network", self.prefix]
        words += ["--network-alias", name, *HARDENED]
        if volume is not None:
            words += ["--volume", f"{volume}:/runs"]
        for variable, value in environment.items():
            words += ["--env", f"{variable}={value}"]
        podman(*words, self.image, *command)
        container = self.containers[name] = Container(f"{self.prefix}-{name}")
        return container

    def once(self, *command: str, volume: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in a container without a network, to its end."""
        mount = () if volume is None else ("--volume", f"{volume}:/runs")
        words = ("run", "--rm", "--no-healthcheck", "--network", "none", *HARDENED, *mount, self.image, *command)
        return podman(*words, check=check, timeout=2 * SECONDS)
