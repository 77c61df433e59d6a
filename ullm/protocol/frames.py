"""Messages as bytes: length-prefixed msgpack frames, for workers at the end of a pipe.

A frame is four bytes of length, little endian, and that many bytes of msgpack. The decoder checks types, so
it returns nothing but the known messages.
"""

from __future__ import annotations

import struct
from typing import Generic, TypeVar

import msgspec

from ullm.errors import FrameBroken
from ullm.protocol.messages import NewSequence, NotUnderstood

MAX_FRAME = 256 << 20
"""Maximum size of a frame in bytes, far above any message; a longer one means that something else wrote to
the pipe."""

_PREFIX = struct.Struct("<I")

M = TypeVar("M")


def encode(message: msgspec.Struct) -> bytes:
    """Return the frame of a message.

    Raises:
        FrameBroken: the message is longer than `MAX_FRAME`, or has a value that no frame can carry. Nothing
            of it is sent.
    """
    try:
        body = msgspec.msgpack.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise FrameBroken(f"a {type(message).__name__} that cannot be encoded: {error}") from None
    if len(body) > MAX_FRAME:
        raise FrameBroken(f"a {type(message).__name__} of {len(body)} bytes; frames have at most {MAX_FRAME}")
    return _PREFIX.pack(len(body)) + body


def check_sendable(sequence: NewSequence, num_tokens: int) -> None:
    """Return if a step with this sequence can be sent.

    Args:
        sequence: without its tokens, which were checked before.
        num_tokens: their number.

    Raises:
        FrameBroken: it cannot, since it is too long, or has a value that no frame can carry.
    """
    size = len(encode(sequence)) + 9 * num_tokens
    if size > MAX_FRAME // 2:
        raise FrameBroken(f"up to {size} bytes for one sequence; at most {MAX_FRAME // 2}")


class FrameReader(Generic[M]):
    """Splits a stream of bytes into messages of one language; keeps an incomplete rest."""

    def __init__(self, language: object, max_frame: int = MAX_FRAME) -> None:
        """``language`` is a union of messages, such as `ToWorker`; no frame is longer than ``max_frame``."""
        self.max_frame = max_frame
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(language)
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray) -> None:
        """Append bytes as read from the pipe."""
        self._buffer += data

    def unread(self, data: bytes) -> None:
        """Put bytes in front of all that have been fed and not yet decoded."""
        self._buffer[:0] = data

    def next(self) -> M | NotUnderstood | None:
        """Return the next complete message, `NotUnderstood` for an unknown one, or None until more is fed.

        Raises:
            FrameBroken: the bytes are not a frame; nothing after them can be trusted.
        """
        if len(self._buffer) < _PREFIX.size:
            return None
        (length,) = _PREFIX.unpack_from(self._buffer)
        if length > self.max_frame:
            raise FrameBroken(f"a frame of {length} bytes; frames have at most {self.max_frame}")
        end = _PREFIX.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_PREFIX.size : end])
        del self._buffer[:end]
        return self._decode(body)

    def _decode(self, body: bytes) -> M | NotUnderstood:
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:  # msgpack, but not one of the messages
            return NotUnderstood(str(error))
        except msgspec.DecodeError as error:
            raise FrameBroken(f"a frame that is not msgpack: {error}") from None
