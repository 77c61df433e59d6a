"""Logging: any key may be logged, at any level."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from ullm.logs import JsonFormatter, KeyValueFormatter, get_logger


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
