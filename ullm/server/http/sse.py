"""Server-sent events: a stream that a handler opens, writes to, and closes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import trio

from ullm.server.api.answers import error_event
from ullm.server.api.message_answer import message_error_event
from ullm.server.api.message_objects import PING

CHUNKS = "ullm.chunks"
"""An extension in the scope of a request (ASGI 3, extensions): ``async (bytes) -> None`` sends a piece of a
body of unknown length, after the start of the response and in place of ``http.response.body``. It is optional
for the server, and meant for many small pieces, which cost half as much this way."""

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip (HTML standard, server-sent events, 9.2.6) and proxies count as traffic."""

Send = Callable[[Any], Awaitable[None]]
"""ASGI's ``send``."""

_HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx, and proxies that follow it, would hold events back
}

T = TypeVar("T", covariant=True)


@dataclass(frozen=True)
class Dialect:
    """The events of a stream that are no part of the answer, as the client's API has them.

    Args:
        error: returns the events that end a stream with an error.
        silence: what the client gets after a silence.
    """

    error: Callable[[BaseException], bytes] = error_event
    silence: bytes = KEEP_ALIVE


OPENAI = Dialect()
ANTHROPIC = Dialect(message_error_event, PING)


@dataclass(frozen=True)
class Wire:
    """Sends the answer to one request.

    Args:
        send_chunk: see `CHUNKS`; None where the server does not have it.
    """

    send: Send
    send_chunk: Callable[[bytes], Awaitable[None]] | None = None

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the status and the headers."""
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    @property
    def write(self) -> Callable[[bytes], Awaitable[None]]:
        """Sends a piece of the body."""
        return self.send_chunk or self._send_body

    async def _send_body(self, data: bytes) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self) -> None:
        """End the body."""
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})


class TimedSource(Protocol[T]):
    """Items that arrive over time."""

    async def next(self, deadline: float) -> T | None:
        """Return the next item, or None if none comes before ``deadline``, in trio's time.

        Raises:
            StopAsyncIteration: nothing more will come.
        """


class EventStream:
    """The body of one response; the status and the headers go with its first piece.

    Args:
        headers: beside those that every event stream has.
        keep_alive: seconds of silence after which the client gets ``silence``.
        silence: by default a comment.
    """

    def __init__(
        self, wire: Wire, headers: Mapping[str, str], keep_alive: float, silence: bytes = KEEP_ALIVE
    ) -> None:
        self._wire = wire
        self._send_piece = wire.write
        self._headers = headers
        self._keep_alive = keep_alive
        self.silence = silence
        self._silent_since = trio.current_time()
        self.started = False

    async def write(self, data: bytes) -> None:
        """Send events."""
        await self.begin()
        await self._send_piece(data)
        self._silent_since = trio.current_time()

    async def begin(self) -> None:
        """Send the status and the headers, unless they were sent."""
        if not self.started:
            headers = {**_HEADERS, **self._headers}
            await self._wire.start(200, [(name.lower().encode(), v.encode()) for name, v in headers.items()])
            self.started = True

    def each(self, source: TimedSource[T]) -> KeptAlive[T]:
        """Iterate over the items of ``source``, with a comment for the client after each silence.

        It is silent while the request waits in the queue, for a restarted worker, or for the engine to wake.
        """
        return KeptAlive(self, source)

    @property
    def comment_due(self) -> float:
        """Trio time at which the client gets a comment, unless something is written before."""
        return self._silent_since + self._keep_alive


class KeptAlive(Generic[T]):
    """See `EventStream.each`. No generator, which would have to be closed."""

    def __init__(self, stream: EventStream, source: TimedSource[T]) -> None:
        self._stream, self._source = stream, source

    def __aiter__(self) -> KeptAlive[T]:
        return self

    async def __anext__(self) -> T:
        while (item := await self._source.next(self._stream.comment_due)) is None:
            await self._stream.write(self._stream.silence)
        return item


@asynccontextmanager
async def open_event_stream(
    wire: Wire, headers: Mapping[str, str], keep_alive: float, dialect: Dialect = OPENAI
) -> AsyncIterator[EventStream]:
    """Open the event stream that answers a request; its handler writes to it.

    An error before the first write is raised: the answer is then an error response with a status of its own.
    A later one ends the stream as an event.

    Args:
        wire: of the request.
        headers: beside those that every event stream has.
        keep_alive: see `EventStream`.
        dialect: of the client's API.
    """
    stream = EventStream(wire, headers, keep_alive, dialect.silence)
    try:
        yield stream
    except (Exception, BaseExceptionGroup) as error:
        if not stream.started or _is_cancelled(error):
            raise
        await stream.write(dialect.error(error))
    await stream.begin()  # a stream that is taken up at its end has no events
    await wire.finish()


def _is_cancelled(error: BaseException) -> bool:
    return isinstance(error, BaseExceptionGroup) and error.subgroup(trio.Cancelled) is not None
