import json
import logging
import os
import sys
import warnings
from datetime import datetime, timedelta

import pytest

from spheres.cli import LogTail
from spheres.config import MAX_MESSAGE_BYTES
from spheres.errors import ConfigError
from spheres.exposure import insecure_warning, is_loopback
from spheres.logs import VARIABLE, JsonFormatter, formatter, json_asked, said_error
from spheres.v1 import work_pb2 as pb


def record(message, *args, exc_info=None):
    made = logging.LogRecord("spheres.sphere", logging.WARNING, __file__, 1, message, args, exc_info)
    made.created = 1_700_000_000.25
    return made


def test_a_line_of_json_has_time_level_logger_message_and_the_names_known_by_then():
    names: dict[str, str] = {}
    made = JsonFormatter(lambda: names)
    first = json.loads(made.format(record("%s is %d %%\nlong", "s-1", 3)))
    assert first == {
        "time": "2023-11-14T22:13:20.250000Z", "level": "WARNING", "logger": "spheres.sphere",
        "message": "s-1 is 3 %\nlong",
    }  # fmt: skip
    assert datetime.fromisoformat(first["time"]).utcoffset() == timedelta(0)
    names |= {"sphere_id": "s-1", "run_id": "r-1"}
    line = made.format(record('a "quoted" word'))
    assert "\n" not in line
    assert json.loads(line) == {**first, "message": 'a "quoted" word', **names}


def test_an_exception_is_in_the_same_line():
    try:
        raise ValueError("of this kind")
    except ValueError:
        line = JsonFormatter().format(record("it failed", exc_info=sys.exc_info()))
    assert len(line.splitlines()) == 1
    said = json.loads(line)
    assert said["exception"].startswith("Traceback (most recent call last)")
    assert said["exception"].endswith("ValueError: of this kind")


def test_the_stack_of_a_caller_is_in_the_same_line_too(caplog):
    logging.getLogger("of.mine").warning("who calls?", stack_info=True)
    (made,) = caplog.records
    said = json.loads(JsonFormatter().format(made))
    assert said["stack"].startswith("Stack (most recent call last):\n")
    assert "test_the_stack_of_a_caller_is_in_the_same_line_too" in said["stack"]
    assert "exception" not in said


def test_an_exception_that_was_asked_for_where_there_is_none_is_left_out():
    said = json.loads(JsonFormatter().format(record("all is well", exc_info=(None, None, None))))
    assert said.keys() == {"time", "level", "logger", "message"}


def test_text_is_the_default_and_other_kinds_are_refused():
    for kind in ("", "text"):
        assert formatter(kind, "%(levelname)s %(message)s").format(record("now")) == "WARNING now"
    with pytest.raises(ConfigError, match="allowed: text or json"):
        formatter("JSON", "")


def test_json_is_asked_for_by_the_last_flag_or_else_the_environment(monkeypatch):
    for value, words, asked in [
        ("", "", False),
        ("json", "", True),
        ("", "start", False),
        ("json", "start", True),
        ("json", "start --log-format text", False),
        ("", "start --log-format=text --log-format=json", True),
        ("", "start --log-format", False),
        ("", "start --host --log-format json", True),
    ]:
        monkeypatch.setenv(VARIABLE, value)
        assert json_asked(words.split()) is asked


def test_warnings_become_log_lines_too(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        try:
            formatter("json", "")
            warnings.warn("of a library", UserWarning, stacklevel=1)
        finally:
            logging.captureWarnings(False)
    assert "of a library" in caplog.text


def test_the_error_of_a_log_that_has_ended_is_found_in_either_form():
    line = JsonFormatter().format(record("no such task"))
    assert said_error("error: no such task") == "no such task"
    assert said_error(line.replace("WARNING", "ERROR")) == "no such task"
    for other in (line, "told to stop", "7", "{}", '["ERROR"]', ""):
        assert said_error(other) == ""


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("127.0.0.1", True), ("127.3.2.1", True), ("[::1]", True), ("localhost", True),
        ("0.0.0.0", False), ("[::]", False), ("10.0.0.7", False), ("node-3", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_loopback(host, wanted):
    assert is_loopback(host) is wanted


def test_the_warning_names_the_address_and_what_to_do():
    said = insecure_warning("0.0.0.0:7070")
    assert "0.0.0.0:7070" in said
    assert "private network" in said
    assert len(said.splitlines()) == 1


@pytest.fixture
def tail():
    made = LogTail()
    logger = logging.Logger("a test")  # noqa: LOG001 - of nobody else
    logger.addHandler(made)
    return made, logger


def test_the_end_of_the_log_can_always_be_sent(tail):
    """File names that are no UTF-8, lines of any length, and more of them than are kept."""
    kept, logger = tail
    logger.info("reading %s", os.fsdecode(b"/data/caf\xe9.npz"))
    assert kept.last(10) == ["reading /data/caf\\udce9.npz"]
    logger.info("x" * 2_000_000)
    assert [line[:3] for line in kept.last(10)] == ["rea", "xxx"]
    for _ in range(10_000):
        logger.info("ü" * 5_000)
    for count in (1, 100, 10_000):
        report = pb.LogReport(sphere_id="s-1", lines=kept.last(count))
        assert 1 <= len(report.lines) <= count
        assert report.ByteSize() < MAX_MESSAGE_BYTES / 2


def test_a_log_call_with_wrong_arguments_does_not_raise_into_who_makes_it(tail, capsys):
    kept, logger = tail
    logger.info("%d samples", "three")
    assert "Arguments: ('three',)" in capsys.readouterr().err
    logger.info("goes on")
    assert kept.last(10) == ["goes on"]
