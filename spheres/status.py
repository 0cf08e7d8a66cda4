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
    (e.VersionMismatchError, grpc.StatusCode.FAILED_PRECONDITION),
    (e.FingerprintError, grpc.StatusCode.FAILED_PRECONDITION),
    (e.RefusedError, grpc.StatusCode.FAILED_PRECONDITION),
    (e.RunStateError, grpc.StatusCode.FAILED_PRECONDITION),
    (e.CheckpointError, grpc.StatusCode.DATA_LOSS),
    (e.LinkClosedError, grpc.StatusCode.UNAVAILABLE),
    (e.UnreachableError, grpc.StatusCode.UNAVAILABLE),
    (e.ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
)

_BY_NAME = {cls.__name__: cls for cls, _ in _CODES} | {"GradientError": e.GradientError, "TaskError": e.TaskError}

#: for a peer that does not say which error it is (another language)
_BY_CODE: dict[grpc.StatusCode, type[e.ArmillaryError]] = {
    grpc.StatusCode.DATA_LOSS: e.ChecksumError,
    grpc.StatusCode.ABORTED: e.StaleError,
    grpc.StatusCode.OUT_OF_RANGE: e.CreditError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: e.MessageTooLargeError,
    grpc.StatusCode.INVALID_ARGUMENT: e.ProtocolError,
    grpc.StatusCode.NOT_FOUND: e.WrongRunError,
    grpc.StatusCode.FAILED_PRECONDITION: e.RefusedError,
    grpc.StatusCode.UNIMPLEMENTED: e.RefusedError,
    grpc.StatusCode.UNAVAILABLE: e.LinkClosedError,
}


def code_of(error: e.ArmillaryError) -> tuple[grpc.StatusCode, str]:
    """Return the code and the details: the error's name, then its sentence."""
    for cls, code in _CODES:
        if isinstance(error, cls):
            return code, f"{type(error).__name__}: {error}"
    return grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"


def from_status(code: grpc.StatusCode, details: str) -> e.ArmillaryError:
    """Return the error that the other side meant."""
    name, _, sentence = (details or "").partition(": ")
    if name in _BY_NAME and sentence:
        return _BY_NAME[name](sentence)
    cls = _BY_CODE.get(code, e.LinkClosedError)
    return cls(details or code.name)


def from_rpc_error(error: grpc.RpcError, what: str) -> e.ArmillaryError:
    """Return the error of a call; ``what`` names what was called, for errors of the network."""
    code = error.code() if isinstance(error, grpc.Call) or hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (error.details() if hasattr(error, "details") else "") or ""
    name = details.partition(": ")[0]
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED) and name not in _BY_NAME:
        return e.UnreachableError(f"{what} does not answer; is it running, and is the address right?")
    return from_status(code, details)
