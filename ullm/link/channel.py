"""Frames over a stream of bytes: what both ends of a link use."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import trio

from ullm.errors import FrameBroken, LinkLost
from ullm.protocol.frames import MAX_FRAME, FrameReader, encode
from ullm.protocol.messages import Frame, NotUnderstood

READ_BYTES = 1 << 16
STRANGER_BYTES = 1 << 14
"""Maximum size of a frame from somebody who has not shown yet who it is."""

M = TypeVar("M")


class Channel(Generic[M]):
    """One end of a connection.

    Args:
        stream: what the bytes go over; closed by whoever made it.
        language: the messages that the other end sends.
    """

    def __init__(self, stream: trio.abc.Stream, language: Any) -> None:
        self._stream = stream
        self._frames: FrameReader[M] = FrameReader(language, STRANGER_BYTES)

    def trust(self) -> None:
        """Take frames of any size from now on."""
        self._frames.max_frame = MAX_FRAME

    async def send(self, *messages: Frame) -> None:
        """Send messages, in one piece; only one task may do so at a time.

        Raises:
            LinkLost: the connection has ended.
        """
        try:
            await self._stream.send_all(b"".join(map(encode, messages)))
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LinkLost(_cause(error)) from error

    async def receive(self) -> M:
        """Return the next message.

        Raises:
            LinkLost: the connection has ended, or the other end does not speak this language.
        """
        try:
            while (message := self._frames.next()) is None:
                data = await self._stream.receive_some(READ_BYTES)
                if not data:
                    raise LinkLost("the other end has closed the connection")
                self._frames.feed(data)
        except FrameBroken as error:
            raise LinkLost(f"the other end is not ullm: {error}") from None
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LinkLost(_cause(error)) from error
        if isinstance(message, NotUnderstood):
            raise LinkLost(f"the other end speaks another language: {message.detail}")
        return message


def _cause(error: BaseException) -> str:
    reason = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return (getattr(reason, "strerror", None) or str(reason) or "the connection is broken").lower()
