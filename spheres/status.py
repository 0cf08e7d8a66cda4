"""Errors to gRPC codes and back: the only table. Only the rpc layer uses it."""

from __future__ import annotations

import grpc

from spheres import errors as e

__all__ = ["code_of", "from_rpc_error", "from_status"]

#: most specific first: the first class that fits gives the code
_CODES: tuple[tuple[type[e.ArmillaryError], grpc.StatusCode], ...] = (
    (e.ChecksumError, grpc.StatusCode.DATA_LOSS),
    (e.StaleError, grpc.StatusCode.ABORTED),
    (e.CreditError, grpc.StatusCode.OUT_OF_RANGE),
    (e.MessageTooLargeError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (e.ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (e.WrongRunError, grpc.StatusCode.NOT_FOUND),
    (e.RefusedError, grpc.StatusCode.FAILED_PRECONDITION),
    (e.RunStateError, grpc.StatusCode.FAILED_PRECONDITION),
    (e.CheckpointError, grpc.StatusCode.DATA_LOSS),
    (e.LinkClosedError, grpc.StatusCode.UNAVAILABLE),
    (e.UnreachableError, grpc.StatusCode.UNAVAILABLE),
    (e.ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (e.ArmillaryError, grpc.StatusCode.INTERNAL),
)

_BY_NAME: dict[str, type[e.ArmillaryError]] = {name: getattr(e, name) for name in e.__all__}

#: for a peer that does not say which error it is (another language, or gRPC itself)
_BY_CODE: dict[grpc.StatusCode, type[e.ArmillaryError]] = {
    grpc.StatusCode.DATA_LOSS: e.ChecksumError,
    grpc.StatusCode.ABORTED: e.StaleError,
    grpc.StatusCode.OUT_OF_RANGE: e.CreditError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: e.MessageTooLargeError,
    grpc.StatusCode.INVALID_ARGUMENT: e.ProtocolError,
    grpc.StatusCode.NOT_FOUND: e.WrongRunError,
    grpc.StatusCode.FAILED_PRECONDITION: e.RefusedError,
    grpc.StatusCode.PERMISSION_DENIED: e.RefusedError,
    grpc.StatusCode.UNAUTHENTICATED: e.RefusedError,
    grpc.StatusCode.UNIMPLEMENTED: e.RefusedError,
}

#: Bytes of details: they travel in a header, percent-encoded to at most three times as much, and gRPC drops the whole
#: status where the headers are over 8 KiB.
_MOST_DETAILS = 2_000


def code_of(error: e.ArmillaryError) -> tuple[grpc.StatusCode, str]:
    """Return the code and the details: the error's name, then its sentence, cut where it is too long."""
    code = next(code for cls, code in _CODES if isinstance(error, cls))
    details = f"{type(error).__name__}: {error}".encode("utf-8", "replace")
    if len(details) > _MOST_DETAILS:
        details = details[:_MOST_DETAILS] + b" ..."
    return code, details.decode("utf-8", "ignore")


def from_status(code: grpc.StatusCode, details: str | None) -> e.ArmillaryError:
    """Return the error that the other side meant."""
    name, colon, sentence = (details or "").partition(": ")
    if colon and name in _BY_NAME:
        return _BY_NAME[name](sentence)
    return _BY_CODE.get(code, e.LinkClosedError)(details or code.name)


def from_rpc_error(error: grpc.RpcError, what: str) -> e.ArmillaryError:
    """Return the error of a call; ``what`` names what was called, for errors of the network."""
    # The base class has neither; what a channel raises has both.
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (error.details() if hasattr(error, "details") else "") or ""
    if details.partition(": ")[0] not in _BY_NAME:
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return e.UnreachableError(f"{what} does not answer; is it running, and is the address right?")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return e.RefusedError(f"{what} does not serve this; is it control, and of the same release?")
    return from_status(code, details)
