"""What is told of a seed: what happens, line by line with virtual times, and the whole story where it failed."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from spheres.errors import ArmillaryError
from spheres.frames import decode
from spheres.testing.memory import Pipe
from spheres.v1 import work_pb2 as pb
from tests.simulation.plan import Plan

if TYPE_CHECKING:
    from tests.simulation.world import Node

#: lines that the story of a failure has
_MOST_LINES = 150


class SeedError(AssertionError):
    """What went wrong, with what had happened before."""


class Story:
    """One seed's. Mutable state: its last lines. ``log`` is given each, where somebody reads along."""

    def __init__(self, plan: Plan, now: Callable[[], float], log: Callable[[str], None] | None) -> None:
        self.plan = plan
        self._now, self._log = now, log
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)

    def say(self, text: str) -> None:
        line = f"{self._now():11.6f}  {text}"
        self._lines.append(line)
        if self._log is not None:
            self._log(line)

    def say_message(self, pipe: Pipe, message: bytes) -> None:
        """A message has arrived on a Work stream."""
        connection = pipe.connection
        if pipe.up:
            text = f"{connection.dialler} -> {connection.listener}: {brief(decode_or_none(pb.WorkRequest, message))}"
        else:
            text = f"{connection.listener} -> {connection.dialler}: {brief(decode_or_none(pb.WorkResponse, message))}"
        self.say(f"    {text}")

    @contextlib.contextmanager
    def tells_logs(self) -> Iterator[None]:
        """The nodes' own log lines are told where somebody reads along, and nowhere else."""
        loggers = [logging.getLogger(name) for name in ("spheres", "control")]
        before = [(logger, logger.level, logger.propagate) for logger in loggers]
        handler = _Told(self.say) if self._log is not None else logging.NullHandler()
        try:
            for logger in loggers:
                logger.addHandler(handler)
                logger.propagate = False
                logger.setLevel(logging.DEBUG if self._log is not None else logging.CRITICAL + 1)
            yield
        finally:
            for logger, level, propagate in before:
                logger.removeHandler(handler)
                logger.setLevel(level)
                logger.propagate = propagate

    def of(self, error: BaseException, root: Any, living: Iterable[Node]) -> SeedError:
        """Return the whole story of a run that went wrong: its plan, its last lines, how its nodes stand.

        ``root`` is control's hub, None where there is none.
        """
        what = f"{type(error).__name__}: {error}" if not isinstance(error, AssertionError) else str(error)
        lines = [f"seed {self.plan.seed}: {what}", f"  {self.plan}"]
        lines += [f"  fault {number}: {fault}" for number, fault in enumerate(self.plan.faults)]
        lines += ["  what happened:", *(f"    {line}" for line in self._lines)]
        if root is not None:
            lines += ["  how they stand:", f"    {stand('control', root)}"]
        lines += [
            f"    {stand(node.called, node.sphere.hub)}{' STOPPED' if node.process.stopped else ''}"
            for node in living
            if node.sphere is not None and node.sphere.hub is not None
        ]
        return SeedError("\n".join(lines))


class _Told(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.DEBUG)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(f"  log {record.levelname}: {record.getMessage()}")


def stand(name: str, hub: Any) -> str:
    """Return in one line how a hub stands."""
    ledger = hub.ledger
    slots = {f"{b.lo}-{b.hi}": owner or "self" for b, owner in ledger.slots.items()}
    edges = {n: f"a{e.attempt} c{e.capacity:g}{'' if e.ready else ' not ready'}" for n, e in ledger.edges.items()}
    return (
        f"{name}: {hub.work} session {hub.up.session} attempt {ledger.attempt} f {ledger.frontier} "
        f"allowed {ledger.allowed} assigned {ledger.assigned} waiting {ledger.waiting} stuck {ledger.stuck} "
        f"slots {slots} computing {ledger.computing} queue {ledger.queue} held {sorted(ledger.held)} edges {edges} "
        f"{hub.weights!r}"
    )


def decode_or_none(kind: Any, data: bytes) -> Any:
    try:
        return decode(kind, data)
    except ArmillaryError:
        return None


def brief(message: Any) -> str:
    """Return a message in one line, without payload."""
    if message is None:
        return "garbage"
    parts = []
    for descriptor, value in message.ListFields():
        if descriptor.name == "tag":
            parts.append(f"{value.term}/{value.step}/{value.kind}")
        elif descriptor.name in ("gradient_chunk", "weights_chunk"):
            parts.append(f"chunk {value.index} of {value.block.lo}-{value.block.hi}")
        elif descriptor.name == "welcome":
            parts.append(f"welcome {'/'.join(node.id for node in value.path)}")
        elif descriptor.name in ("gradient_footer", "state_report"):
            parts.append(descriptor.name)
        else:
            text = " ".join(str(value).split()) if descriptor.message_type else str(value)
            parts.append(f"{descriptor.name} {text}"[:160])
    return ", ".join(parts)
