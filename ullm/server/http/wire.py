"""The way of an answer to the server: ASGI's messages, and a short cut for small pieces."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

CHUNKS = "ullm.chunks"
"""An extension in the scope of a request (ASGI 3, extensions): ``async (bytes) -> None`` sends a piece of a
body of unknown length, after the start of the response and in place of ``http.response.body``. It is optional
for the server, and meant for many small pieces, which cost half as much this way."""

Send = Callable[[Any], Awaitable[None]]
"""ASGI's ``send``."""


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
