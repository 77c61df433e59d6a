"""Logging: any key may be logged, at any level."""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from ullm.logs import (
    MAX_QUEUED,
    JsonFormatter,
    KeyValueFormatter,
    PatientWriter,
    configure,
    flush,
    get_logger,
)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logger = logging.getLogger("ullm.test_logs")
    logger.addHandler(handler)
    logger.setLevel("DEBUG")
    yield written
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def write(stream: io.StringIO, formatter: logging.Formatter, **values: object) -> str:
    logger = logging.getLogger("ullm.test_logs")
    logger.handlers[0].setFormatter(formatter)
    get_logger("ullm.test_logs").info("asleep", **values)
    return stream.getvalue()


@pytest.mark.parametrize(
    "key", ["level", "event", "name", "message", "args", "module", "extra", "self", "stage"]
)
def test_any_key_can_be_logged(stream: io.StringIO, key: str) -> None:
    values: dict[str, object] = {key: 7}
    line = write(stream, KeyValueFormatter(), **values)
    assert "asleep" in line
    assert f"{key}=7" in line or f"{key}_=7" in line


def test_json_has_one_object_per_record(stream: io.StringIO) -> None:
    record = json.loads(write(stream, JsonFormatter(), seconds=0.5))
    assert (record["event"], record["level"], record["seconds"]) == ("asleep", "info", 0.5)


def test_named_arguments_are_values_in_json_and_in_text(stream: io.StringIO) -> None:
    """As `ullm.supervision` logs, which knows nothing of ullm's loggers."""
    logger = logging.getLogger("ullm.test_logs")
    for formatter in (JsonFormatter(), KeyValueFormatter()):
        logger.handlers[0].setFormatter(formatter)
        logger.warning(
            "child failed  child=%(child)s cause=%(cause)s", {"child": "a", "cause": "OSError: gone"}
        )
    as_json, as_text = stream.getvalue().splitlines()
    record = json.loads(as_json)
    assert (record["event"], record["child"]) == ("child failed", "a")
    assert as_text.endswith("warning ullm.test_logs  child failed  child=a cause=OSError: gone")


def test_a_reader_that_has_stopped_to_read_holds_up_nobody() -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    writer = PatientWriter(write)
    record = logging.makeLogRecord({"msg": "x" * 1000, "levelno": logging.INFO})
    for _ in range(MAX_QUEUED + 500):
        writer.emit(record)
    writer.flush(0.01)
    text = b""
    while b"lines before this one were dropped" not in text:
        try:
            text += os.read(read, 1 << 16)
        except BlockingIOError:
            writer.emit(record)
            writer.flush(0.01)
    os.close(read)
    writer.emit(record)  # nobody will ever read it
    writer.flush(1.0)
    os.close(write)


@pytest.mark.parametrize("formatter", [KeyValueFormatter(), JsonFormatter()], ids=["text", "json"])
def test_each_line_has_its_date(stream: io.StringIO, formatter: logging.Formatter) -> None:
    before = time.time()
    line = write(stream, formatter)
    date = json.loads(line)["date"] if line.startswith("{") else line.split()[0]
    logged = datetime.fromisoformat(date)
    assert logged.tzinfo is not None
    assert before - 0.001 <= logged.timestamp() <= time.time()


@pytest.mark.parametrize("as_json", [False, True])
def test_the_form_of_lines_is_configured(as_json: bool, capfd: pytest.CaptureFixture[str]) -> None:
    configure("info", as_json=as_json)
    get_logger("ullm.test_logs").info("asleep", seconds=0.5)
    flush(5.0)
    line = capfd.readouterr().err
    assert line.startswith("{") == as_json
    assert ("seconds=0.5" in line) != as_json
