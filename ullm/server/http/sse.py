"""Server-sent events: a stream that a handler opens, writes to, and closes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

import trio

from ullm.server.api.chunks import error_event
from ullm.server.http.quart_connection import current_wire
from ullm.server.http.wire import Wire

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip (HTML standard, server-sent events, 9.2.6) and proxies count as traffic."""

_HEADERS = {"content-type": "text/event-stream", "cache-control": "no-cache"}

T = TypeVar("T", covariant=True)


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
        keep_alive: seconds of silence after which the client gets a comment.
    """

    def __init__(self, wire: Wire, headers: Mapping[str, str], keep_alive: float) -> None:
        self._wire = wire
        self._send_piece = wire.write
        self._headers = headers
        self._keep_alive = keep_alive
        self._silent_since = trio.current_time()
        self.started = False

    async def write(self, data: bytes) -> None:
        """Send events."""
        if not self.started:
            headers = {**_HEADERS, **self._headers}
            await self._wire.start(200, [(name.lower().encode(), v.encode()) for name, v in headers.items()])
            self.started = True
        await self._send_piece(data)
        self._silent_since = trio.current_time()

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
            await self._stream.write(KEEP_ALIVE)
        return item


@asynccontextmanager
async def open_event_stream(headers: Mapping[str, str], keep_alive: float) -> AsyncIterator[EventStream]:
    """Open the event stream that answers the current request; its handler then returns `sent`.

    An error before the first write is raised: the answer is then an error response with a status of its own.
    A later one ends the stream as an event.

    Args:
        headers: beside those that every event stream has.
        keep_alive: see `EventStream`.
    """
    wire = current_wire()
    stream = EventStream(wire, headers, keep_alive)
    try:
        yield stream
    except (Exception, BaseExceptionGroup) as error:
        if not stream.started or _is_cancelled(error):
            raise
        await stream.write(error_event(error))
    await wire.finish()


def _is_cancelled(error: BaseException) -> bool:
    return isinstance(error, BaseExceptionGroup) and error.subgroup(trio.Cancelled) is not None
