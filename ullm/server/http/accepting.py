"""Accepting connections, many in one turn of the event loop, and no more than there may be."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from ullm.server.http.listener import Listener

AT_ONCE = 64
"""Connections that are accepted in one turn of the event loop, if so many wait."""


class Bounded(trio.abc.Listener[trio.SocketStream]):
    """Accepts a connection only when there is room for it; until then it waits in the kernel's queue.

    Args:
        sock: listens; a duplicate of it is used.
        connections: who knows how many there may be.
    """

    def __init__(self, sock: socket.socket, connections: Listener) -> None:
        self._direct = sock.dup()
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._direct))
        self._connections = connections
        self._at_once = 0

    async def accept(self) -> trio.SocketStream:
        """The next connection."""
        stream = self._accept_waiting()
        if stream is None:
            await self._connections.make_room(self._listener.socket)
            stream = await self._listener.accept()
            self._at_once = AT_ONCE
        self._connections.take()
        return stream

    def _accept_waiting(self) -> trio.SocketStream | None:
        """One that has come with the one before: by a turn of the loop for each, a thousand took seconds."""
        if self._at_once == 0 or not self._connections.has_room:
            return None
        self._at_once -= 1
        try:
            sock, _ = self._direct.accept()
        except OSError:  # there is none, or what is wrong comes again in the next turn
            self._at_once = 0
            return None
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def aclose(self) -> None:
        """Stop listening; the socket that this was made of is still open."""
        await self._listener.aclose()
