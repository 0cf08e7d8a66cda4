"""Every error of the project, one class per cause.

ArmillaryError
├── ConfigError              a flag, key or file that does not fit            (exit 2)
├── TaskError                the user's task: cannot load, wrong shape, raised (exit 3)
│   ├── TaskLoadError
│   ├── DataMissingError
│   └── GradientError        raised inside ``gradient``; carries the traceback
├── ProtocolError            a message that breaks the protocol; the link ends
│   ├── DecodeError          bytes that are no message
│   ├── MessageTooLargeError a message over the limit
│   ├── CreditError          a chunk beyond credit
│   ├── StaleError           a tag of an earlier run, term, session, step or attempt
│   ├── ChecksumError        bytes that do not fit their checksum
│   └── SegmentError         shared memory that was named and cannot be used
├── RefusedError             the other side said no, with a reason
│   ├── VersionMismatchError another protocol version
│   ├── FingerprintError     task, data or environment differ
│   └── WrongRunError        another run
├── LinkClosedError          the stream ended; the peer may be gone
├── CheckpointError          missing, cut, corrupt or of a newer format       (exit 4)
├── UnreachableError         nobody answers at an address                     (exit 5)
└── RunStateError            a move that the run's state does not allow        (exit 6)

Mapping to gRPC codes is in ``spheres.status`` and nowhere else.
"""

from __future__ import annotations

__all__ = [
    "ArmillaryError",
    "CheckpointError",
    "ChecksumError",
    "ConfigError",
    "CreditError",
    "DataMissingError",
    "DecodeError",
    "FingerprintError",
    "GradientError",
    "LinkClosedError",
    "MessageTooLargeError",
    "ProtocolError",
    "RefusedError",
    "RunStateError",
    "SegmentError",
    "StaleError",
    "TaskError",
    "TaskLoadError",
    "UnreachableError",
    "VersionMismatchError",
    "WrongRunError",
]


class ArmillaryError(Exception):
    """Base of all errors that the project raises on purpose. One line: what, and what to do."""

    #: process exit code of a command that ends with this error
    exit_code = 1


class ConfigError(ArmillaryError):
    """A flag, environment variable, configuration key or value that does not fit."""

    exit_code = 2


class TaskError(ArmillaryError):
    """The user's task did something that training cannot go on from."""

    exit_code = 3


class TaskLoadError(TaskError):
    """The task's module cannot be imported or has no such attribute."""


class DataMissingError(TaskError):
    """A task's data set is not on this machine; the message says how to get it."""


class GradientError(TaskError):
    """``gradient`` or ``evaluate`` raised on a sphere; ``details`` holds that sphere's traceback."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class ProtocolError(ArmillaryError):
    """A message that a correct peer would not send."""


class DecodeError(ProtocolError):
    """Bytes that are no message of the protocol."""


class MessageTooLargeError(ProtocolError):
    """A message over MAX_MESSAGE_BYTES."""


class CreditError(ProtocolError):
    """A chunk that the receiver has not yet made room for (N6)."""


class StaleError(ProtocolError):
    """A message whose tag belongs to the past, or to another run."""


class ChecksumError(ProtocolError):
    """Bytes that do not fit the checksum sent with them."""


class SegmentError(ProtocolError):
    """Shared memory that cannot be made, or that a peer has named and this process cannot read."""


class RefusedError(ArmillaryError):
    """The other side refused, with a reason that says what to do."""

    exit_code = 5


class VersionMismatchError(RefusedError):
    """The other side speaks another protocol version."""


class FingerprintError(RefusedError):
    """Task, data or numeric environment differ between two nodes of one run."""


class WrongRunError(RefusedError):
    """The other side belongs to another run."""


class LinkClosedError(ArmillaryError):
    """The link has ended, by either side or by the network."""


class CheckpointError(ArmillaryError):
    """A checkpoint that is missing, cut, corrupt, of another run or of a newer format."""

    exit_code = 4


class UnreachableError(ArmillaryError):
    """Nobody answers at an address."""

    exit_code = 5


class RunStateError(ArmillaryError):
    """The run's present state does not allow this move."""

    exit_code = 6
