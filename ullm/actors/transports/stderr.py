"""A worker's stderr: forwarded to the log line by line, with its last lines kept for errors."""

from __future__ import annotations

import json
import logging
from collections import deque

import trio

from ullm.actors.transports.base import STDERR_TAIL_LINES, Transport
from ullm.logs import get_logger
from ullm.protocol import stop_budget

LINE_BYTES = 8192
"""Longer lines are split."""

READ_BYTES = 1 << 16

log = get_logger(__name__)


class StderrForwarder:
    """Reads one worker's stderr to its end.

    Args:
        stream: the read end of the pipe.
        transport: names the worker in the log.
    """

    def __init__(self, stream: trio.abc.ReceiveStream, transport: Transport) -> None:
        self._transport = transport
        self._stream = stream
        self._tail: deque[str] = deque(maxlen=STDERR_TAIL_LINES)
        self._ended = trio.Event()

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines."""
        return tuple(self._tail)

    async def run(self) -> None:
        """Forward lines until the end of the stream; a task of the transport."""
        rest = b""
        try:
            async for data in self._stream:
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._forward(line)
                while len(rest) > LINE_BYTES:
                    self._forward(rest[:LINE_BYTES])
                    rest = rest[LINE_BYTES:]
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("stderr closed", worker=self._transport.name)
        finally:
            self._forward(rest)
            self._ended.set()

    async def wait_ended(self) -> None:
        """Wait until the end of stderr, but at most `stop_budget.STDERR_TAIL`."""
        with trio.move_on_after(stop_budget.STDERR_TAIL):
            await self._ended.wait()

    async def close(self) -> None:
        """Close the stream once its end has been read, or `stop_budget.STDERR_TAIL` are over."""
        await self.wait_ended()
        await self._stream.aclose()

    def _forward(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            logger, level, event = _parse_record(text)
            self._tail.append(event)
            get_logger(logger).log(level, event, worker=self._transport.name)


def _parse_record(line: str) -> tuple[str, int, str]:
    """Return logger, level and text of a line: a JSON record of ullm's own, or anything that was printed."""
    try:
        record = json.loads(line)
        level = logging.getLevelNamesMapping()[record.pop("level").upper()]
        logger, text = record.pop("logger"), record.pop("event")
        record.pop("time")
        record.pop("date", None)
    except (ValueError, KeyError, TypeError, AttributeError):
        return __name__, logging.INFO, line
    return logger, level, " ".join([text, *(f"{key}={value}" for key, value in record.items())])
