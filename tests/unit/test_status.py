"""The table of errors and gRPC codes: every class has a code, and comes back as itself."""

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spheres import errors as e
from spheres.status import code_of, from_rpc_error, from_status

ERRORS = [getattr(e, name) for name in e.__all__]

#: What docs and protos promise (work.proto, above each rpc).
CODES = {
    e.VersionMismatchError: "FAILED_PRECONDITION",
    e.FingerprintError: "FAILED_PRECONDITION",
    e.RefusedError: "FAILED_PRECONDITION",
    e.RunStateError: "FAILED_PRECONDITION",
    e.StaleError: "ABORTED",
    e.WrongRunError: "NOT_FOUND",
    e.DecodeError: "INVALID_ARGUMENT",
    e.SegmentError: "INVALID_ARGUMENT",
    e.ProtocolError: "INVALID_ARGUMENT",
    e.ConfigError: "INVALID_ARGUMENT",
    e.CreditError: "OUT_OF_RANGE",
    e.ChecksumError: "DATA_LOSS",
    e.CheckpointError: "DATA_LOSS",
    e.MessageTooLargeError: "RESOURCE_EXHAUSTED",
    e.LinkClosedError: "UNAVAILABLE",
    e.UnreachableError: "UNAVAILABLE",
    e.TaskError: "INTERNAL",
    e.TaskLoadError: "INTERNAL",
    e.DataMissingError: "INTERNAL",
    e.GradientError: "INTERNAL",
    e.ArmillaryError: "INTERNAL",
}


class Call(grpc.RpcError):
    """What a channel raises."""

    def __init__(self, code, details):
        self._code, self._details = code, details

    def code(self):
        return self._code

    def details(self):
        return self._details


def test_the_table_names_every_error():
    assert set(CODES) == set(ERRORS)


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("sentence", ["chunk 3 is wrong: it is late", "a: b: c", "", "über\nzwei Zeilen 100 %"])
def test_every_error_has_its_code_and_comes_back_as_itself(cls, sentence):
    code, details = code_of(cls(sentence))
    assert code.name == CODES[cls]
    back = from_status(code, details)
    assert (type(back), str(back)) == (cls, sentence)
    called = from_rpc_error(Call(code, details), "control at here")
    assert (type(called), str(called)) == (cls, sentence)


def test_an_error_of_a_class_that_the_other_side_does_not_know_comes_back_as_what_its_code_means():
    class NewChecksumError(e.ChecksumError):
        """Of a later release."""

    code, details = code_of(NewChecksumError("wrong"))
    back = from_status(code, details)
    assert (type(back), str(back)) == (e.ChecksumError, "NewChecksumError: wrong")


@given(st.text(max_size=10) | st.text(min_size=1000, max_size=3000))
def test_details_fit_in_a_header_whatever_the_sentence(sentence):
    """gRPC drops the whole status where headers are over 8 KiB; each byte may take three there."""
    code, details = code_of(e.StaleError(sentence))
    assert 3 * len(details.encode()) < 7 * 1024
    back = str(from_status(code, details))
    if len(sentence.encode("utf-8", "replace")) < 1900:
        assert back.encode() == sentence.encode("utf-8", "replace")
    else:
        assert len(back) > 400
        assert back.endswith(" ...") or back == sentence


@pytest.mark.parametrize("code", list(grpc.StatusCode))
@pytest.mark.parametrize("details", ["", None, "no such thing", "Socket closed: 127.0.0.1", "StaleErrors: no name"])
def test_any_status_of_a_peer_in_another_language_gives_an_error_with_its_words(code, details):
    error = from_status(code, details)
    assert isinstance(error, e.ArmillaryError)
    assert str(error) == (details or code.name)


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        ("DATA_LOSS", e.ChecksumError),
        ("ABORTED", e.StaleError),
        ("OUT_OF_RANGE", e.CreditError),
        ("RESOURCE_EXHAUSTED", e.MessageTooLargeError),
        ("INVALID_ARGUMENT", e.ProtocolError),
        ("NOT_FOUND", e.WrongRunError),
        ("FAILED_PRECONDITION", e.RefusedError),
        ("PERMISSION_DENIED", e.RefusedError),
        ("UNAUTHENTICATED", e.RefusedError),
        ("UNIMPLEMENTED", e.RefusedError),
        ("UNAVAILABLE", e.LinkClosedError),
        ("CANCELLED", e.LinkClosedError),
        ("UNKNOWN", e.LinkClosedError),
        ("INTERNAL", e.LinkClosedError),
        ("DEADLINE_EXCEEDED", e.LinkClosedError),
    ],
)
def test_a_status_without_a_name_gives_the_class_of_its_code(code, cls):
    assert type(from_status(grpc.StatusCode[code], "words")) is cls


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED"])
def test_a_call_that_nobody_answers_says_what_to_look_at(code):
    error = from_rpc_error(Call(grpc.StatusCode[code], "failed to connect to all addresses"), "control at here")
    assert type(error) is e.UnreachableError
    assert str(error) == "control at here does not answer; is it running, and is the address right?"


def test_a_call_that_the_other_side_does_not_serve_says_so():
    error = from_rpc_error(Call(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"), "control at here")
    assert type(error) is e.RefusedError
    assert str(error).startswith("control at here does not serve this")


def test_an_rpc_error_without_code_or_details_gives_an_error_too():
    error = from_rpc_error(grpc.RpcError(), "control at here")
    assert (type(error), str(error)) == (e.LinkClosedError, "UNKNOWN")
