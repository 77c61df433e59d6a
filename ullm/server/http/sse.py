"""Server-sent events: what a stream's chunks share is encoded once, the rest per chunk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from ullm.server.api.errors import as_request_error, error_body
from ullm.server.http.connection import Push, Writer
from ullm.server.http.pacing import Pacer
from ullm.server.routes.outputs import Job, Outputs

if TYPE_CHECKING:
    from ullm.engine.output import Output

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip (HTML standard, server-sent events, 9.2.6), and proxies do not."""
DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


def error_event(error: BaseException) -> bytes:
    """How a stream that has begun ends with an error."""
    return b"data: " + error_body(as_request_error(error)) + b"\n\n" + DONE


def response(job: Job, pacer: Pacer, produce: Callable[[Writer], Awaitable[None]]) -> Push:
    """A stream of events, written as often as ``pacer`` allows.

    Args:
        produce: writes the outputs of ``job``.
    """

    async def stream(writer: Writer) -> None:
        job.pace = pacer.interval
        with pacer.stream():
            await produce(writer)

    return Push(stream, error_event)


class KeptAlive:
    """Outputs as they come; the client gets a comment whenever it has heard nothing for a while.

    As while its request waits in the queue, for a worker to be restarted, or for the engine to wake up.

    Args:
        seconds: of silence.
    """

    def __init__(self, outputs: Outputs, writer: Writer, seconds: float) -> None:
        self._outputs, self._writer, self._seconds = outputs, writer, seconds

    def __aiter__(self) -> KeptAlive:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        while (found := await self._outputs.next(self._writer.silent_since + self._seconds)) is None:
            await self._writer.write(KEEP_ALIVE)
        return found


class ChunkEncoder:
    """Encodes the chunks of one stream.

    Args:
        head: the fields that all chunks share.
        with_usage: chunks say ``"usage": null``, because the last one will have it.
    """

    def __init__(self, head: dict[str, object], *, with_usage: bool) -> None:
        self._head = b"data: " + _encoder.encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"

    def choice(self, choice: msgspec.Struct) -> bytes:
        """An event about one choice."""
        return b"".join((self._head, _encoder.encode(choice), self._tail))

    def usage(self, usage: msgspec.Struct) -> bytes:
        """The event with the usage."""
        return b"".join((self._head, b'],"usage":', _encoder.encode(usage), b"}\n\n"))
