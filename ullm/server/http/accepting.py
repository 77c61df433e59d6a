"""Accepting connections: many in one turn of the event loop, and only as many as there are places."""

from __future__ import annotations

import socket

import trio

from ullm.server.http.places import Places

AT_ONCE = 64
"""Connections that are accepted in one turn of the event loop, if that many wait."""


class PlacedListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts a connection only when there is a place for it; until then it waits in the kernel's queue.

    Args:
        sock: listens; a duplicate of it is used.
    """

    def __init__(self, sock: socket.socket, places: Places) -> None:
        self._direct = sock.dup()
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._direct))
        self._places = places
        self._at_once = 0

    async def accept(self) -> trio.SocketStream:
        """Wait for the next connection and take a place for it."""
        stream = self._accept_waiting()
        if stream is None:
            await self._places.wait_for_room(self._listener.socket)
            stream = await self._listener.accept()
            self._at_once = AT_ONCE
        self._places.take()
        return stream

    def _accept_waiting(self) -> trio.SocketStream | None:
        """Accept one that came together with the previous one, if any.

        With a turn of the event loop for each, a thousand of them would take seconds.
        """
        if self._at_once == 0 or not self._places.has_room:
            return None
        self._at_once -= 1
        try:
            sock, _ = self._direct.accept()
        except OSError:  # none waits, or the error comes again in the next turn
            self._at_once = 0
            return None
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def aclose(self) -> None:
        """Stop listening; the socket that this was made of stays open."""
        await self._listener.aclose()
