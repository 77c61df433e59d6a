"""The events of a stream as bytes: what its chunks share is encoded once, the rest per chunk."""

from __future__ import annotations

import msgspec

from ullm.server.api.errors import as_request_error, error_body

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


def error_event(error: BaseException) -> bytes:
    """Return the events that end a stream with an error."""
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
        self._with_usage = with_usage

    def choice(self, choice: msgspec.Struct) -> bytes:
        """Return an event about one choice."""
        return b"".join((self._head, _encoder.encode(choice), self._tail))

    def end(self, usage: msgspec.Struct) -> bytes:
        """Return the last events: the usage, if the client wants it, and ``[DONE]``."""
        if not self._with_usage:
            return DONE
        return b"".join((self._head, b'],"usage":', _encoder.encode(usage), b"}\n\n", DONE))
