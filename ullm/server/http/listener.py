"""Serving an ASGI app on listening sockets, each connection in a task of its own."""

from __future__ import annotations

from collections.abc import Sequence
from socket import socket
from typing import Any

import trio

from ullm.logs import get_logger
from ullm.server.http.accepting import PlacedListener
from ullm.server.http.hypercorn_connection import HypercornConnection, HypercornWorker
from ullm.server.http.places import Places

log = get_logger(__name__)


class Listener:
    """Serves an ASGI app on sockets that listen.

    Args:
        stall_timeout: seconds that a client may leave what it was sent unread.
        max_connections: connections at a time; others wait until one of these ends.
    """

    def __init__(self, app: Any, *, stall_timeout: float, max_connections: int) -> None:
        self._worker = HypercornWorker(app, stall_timeout)
        self._places = Places(max_connections)
        self._stop = trio.Event()

    @property
    def connections(self) -> int:
        """Number of connections that are being served."""
        return self._places.occupied

    def stop(self) -> None:
        """Stop accepting; `serve` returns after the last response."""
        self._stop.set()

    def cut(self) -> None:
        """Close every connection at once, whatever its client has not read yet."""
        self._places.cut_all()

    async def serve(self, sockets: Sequence[socket], *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until stopped and every connection has ended.

        Args:
            sockets: listen already; duplicates of them are used, and closed when this stops.
        """
        async with trio.open_nursery() as handlers:
            async with trio.open_nursery() as accepting:
                listeners = [PlacedListener(sock, self._places) for sock in sockets]
                accepting.start_soon(self._accept, listeners, handlers)
                task_status.started()
                await self._stop.wait()
                accepting.cancel_scope.cancel()
            await self._worker.terminate()

    async def _accept(self, listeners: list[PlacedListener], handlers: trio.Nursery) -> None:
        await trio.serve_listeners(self._handle, listeners, handler_nursery=handlers)

    async def _handle(self, stream: trio.SocketStream) -> None:
        connection = HypercornConnection(self._worker, stream)
        with self._places.occupy(connection):
            try:
                await connection
            except Exception:
                log.exception("connection failed")  # the failure ends this connection only
                connection.cut()
