"""Accepting connections and serving an ASGI app on them, each in a task of its own.

Many connections are accepted in one turn of the event loop, and only as many as there are slots.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from typing import Any

import trio

from ullm.logs import get_logger
from ullm.server.http.connection_slots import ConnectionSlots
from ullm.server.http.hypercorn_connection import HypercornConnection, HypercornWorker
from ullm.server.http.last_connections import take_last
from ullm.server.http.tls import TlsStream
from ullm.system.peers import foreign_user

log = get_logger(__name__)


AT_ONCE = 64
"""Connections that are accepted in one turn of the event loop, if that many wait."""


class Listener:
    """Serves an ASGI app on sockets that listen.

    Args:
        stall_timeout: seconds that a client may leave what it was sent unread.
        max_connections: connections at a time; others wait until one of these ends.
        tls: what to encrypt connections with; None: nothing.
        http2: whether clients may speak HTTP/2, too.
        same_user: whether only this process's user may connect, through a unix socket.
    """

    def __init__(
        self,
        app: Any,
        *,
        stall_timeout: float,
        max_connections: int,
        tls: ssl.SSLContext | None = None,
        http2: bool = False,
        same_user: bool = False,
    ) -> None:
        self._tls = tls
        self._same_user = same_user
        self._worker = HypercornWorker(app, stall_timeout, http2=http2)
        self._slots = ConnectionSlots(max_connections)
        self._stop = trio.Event()

    @property
    def connections(self) -> int:
        """Number of connections that are being served."""
        return self._slots.occupied

    def stop(self) -> None:
        """Stop accepting; `serve` returns after the last response."""
        self._stop.set()

    def cut(self) -> None:
        """Close every connection at once, whatever its client has not read yet."""
        self._slots.cut_all()

    async def serve(
        self,
        sockets: Sequence[socket.socket],
        *,
        shared: bool = False,
        task_status: trio.TaskStatus[None],
    ) -> None:
        """Serve until stopped and every connection has ended.

        Args:
            sockets: listen already; duplicates of them are used, and closed when this stops.
            shared: another process listens on them, too, and goes on: who waits there is left to it.
        """
        async with trio.open_nursery() as handlers:
            async with trio.open_nursery() as accepting:
                listeners = [SlotListener(sock, self._slots) for sock in sockets]
                accepting.start_soon(self._accept, listeners, handlers)
                task_status.started()
                await self._stop.wait()
                for stream in () if shared else [last for each in listeners for last in each.take_last()]:
                    self._slots.take()
                    handlers.start_soon(self._handle, stream)
                accepting.cancel_scope.cancel()
            await self._worker.terminate()

    async def _accept(self, listeners: list[SlotListener], handlers: trio.Nursery) -> None:
        await trio.serve_listeners(self._handle, listeners, handler_nursery=handlers)

    async def _handle(self, stream: trio.SocketStream) -> None:
        if self._same_user and (user := foreign_user(stream.socket)) is not None:
            log.warning("turned away; run all parts as the same user", user=user)
            self._slots.give_back()
            await trio.aclose_forcefully(stream)
            return
        connection = HypercornConnection(
            self._worker, stream if self._tls is None else TlsStream(stream, self._tls)
        )
        with self._slots.occupy(connection):
            try:
                await connection
            except Exception:
                log.exception("connection failed")  # the failure ends this connection only
                connection.cut()


class SlotListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts a connection only when there is a slot for it; until then it waits in the kernel's queue.

    Args:
        sock: listens; a duplicate of it is used.
    """

    def __init__(self, sock: socket.socket, slots: ConnectionSlots) -> None:
        self._direct = sock.dup()
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._direct))
        self._slots = slots
        self._at_once = 0

    async def accept(self) -> trio.SocketStream:
        """Wait for the next connection and take a slot for it."""
        stream = self._accept_waiting()
        if stream is None:
            await self._slots.wait_for_room(self._listener.socket)
            stream = await self._listener.accept()
            self._at_once = AT_ONCE
        self._slots.take()
        return stream

    def _accept_waiting(self) -> trio.SocketStream | None:
        """Accept one that came together with the previous one, if any.

        With a turn of the event loop for each, a thousand of them would take seconds.
        """
        if self._at_once == 0 or not self._slots.has_room:
            return None
        self._at_once -= 1
        try:
            sock, _ = self._direct.accept()
        except OSError:  # none waits, or the error comes again in the next turn
            self._at_once = 0
            return None
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    def take_last(self) -> list[trio.SocketStream]:
        """Let nobody else connect, and return the connections that wait."""
        return [trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in take_last(self._direct)]

    async def aclose(self) -> None:
        """Stop listening; the socket that this was made of stays open."""
        await self._listener.aclose()
