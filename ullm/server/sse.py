"""Server-sent events: what a stream's chunks share is encoded once, the rest per chunk."""

from __future__ import annotations

import msgspec

from ullm.server.errors import as_request_error, error_body

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


def error_event(error: BaseException) -> bytes:
    """How a stream that has begun ends with an error."""
    return b"data: " + error_body(as_request_error(error)) + b"\n\n" + DONE


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
