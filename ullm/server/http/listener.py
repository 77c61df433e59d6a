"""Accepting connections, each served by Hypercorn, with an end for those whose client does not read.

Hypercorn's own server sends within a shield, without a limit, and does not say which connections it has:
one client that stops reading would hold up its request, and the stop of the server, for good. Here every
connection is known, a send that makes no progress for a while ends it, and all of them can be cut at once.
There are never more of them than leave descriptors for the rest of the program; at that limit a connection
without a whole request makes room for a new one.
"""

from __future__ import annotations

import math
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, cast

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, LifespanState
from hypercorn.utils import wrap_app

from ullm.logs import get_logger
from ullm.server.http.accepting import Bounded
from ullm.server.http.connection import CHUNKS

log = get_logger(__name__)

UNSENT_BYTES = 16 << 10
"""How much the kernel takes beyond what the network lets through; the rest waits as tokens, which are
smaller, and become one large piece when the client reads again."""
REQUEST_WITHIN = 20.0
"""Seconds from a connection's beginning to the end of its first request's head."""
UNDISTURBED = 1.0
"""Seconds that a connection has for its next request although others wait for its place."""
_RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
"""SO_LINGER: forget what has not been sent, and tell the client with a reset."""


class ClientConnection(TCPServer):
    """One connection of Hypercorn's, whose sends end when the client stops reading.

    Args:
        stall_timeout: seconds without progress after which a send ends the connection.

    Attributes:
        idle_since: when its last request ended, or it began, or a part of a request's body came; None while
            it has a whole request.
    """

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        stream: trio.SocketStream,
        stall_timeout: float,
    ) -> None:
        super().__init__(app, config, context, LifespanState(), stream)  # type: ignore[arg-type]  # takes either
        self._socket = sock = stream.socket
        # The same descriptor, to send without a turn of the event loop where the kernel has room.
        self._direct = socket.socket(sock.family, sock.type, sock.proto, sock.fileno())
        self.app = cast(AppWrapper, self._call_app)  # Hypercorn calls this one instead
        self._app = app
        self._stall_timeout = stall_timeout
        self._client_left = False
        self._has_asked = False
        self.idle_since: float | None = trio.current_time()

    async def run(self) -> None:
        """Serve the connection until it ends."""
        try:
            await super().run()
        finally:
            self._direct.detach()
            # They refer to this: only a collection of garbage would free them.
            self.__dict__.pop("protocol", None)
            self.__dict__.pop("app", None)

    async def _call_app(self, scope: Any, receive: Any, *others: Any) -> None:
        """Have the app know of `send_chunk`, and take note of a body that is still to come."""
        if scope["type"] == "http" and scope["http_version"] == "1.1":
            scope["extensions"][CHUNKS] = self.send_chunk

        async def noting() -> Any:
            message = await receive()
            if message["type"] == "http.request":
                self.idle_since = trio.current_time() if message.get("more_body") else None
            return message

        if scope["type"] == "http" and _has_body(scope["headers"]):
            self.idle_since = trio.current_time()
        await self._app(scope, noting, *others)

    async def send_chunk(self, data: bytes) -> None:
        """Send a piece of a body in chunked encoding (RFC 9112, 7.1).

        In HTTP/1.1 that is how h11 sends a body without a length. Through Hypercorn's and h11's events, which
        take no note of pieces, the same would cost more than the sending itself.
        """
        await self._send_bytes(b"%x\r\n%b\r\n" % (len(data), data))

    async def _read_data(self) -> None:
        # Hypercorn's own keeps the socket of a client that has left until its idle time is over.
        try:
            await super()._read_data()
        finally:
            self._client_left = True
            await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        """Send bytes, or take note of the connection's state. Called by Hypercorn's protocol.

        A send cannot be cancelled: half a piece would spoil the pieces after it.
        """
        if not isinstance(event, RawData):
            if isinstance(event, Updated):
                self._has_asked = True
                self.idle_since = trio.current_time() if event.idle else None
            if not (self._client_left and isinstance(event, Updated)):
                await super().protocol_send(event)
            return
        await self._send_bytes(event.data)

    async def _send_bytes(self, data: bytes) -> None:
        try:
            rest = data if self.send_lock.locked() else self._send_now(data)
            if rest:
                async with self.send_lock:
                    await self._send(rest)
        except (OSError, trio.ClosedResourceError):  # the client has gone, or was cut
            await self.protocol.handle(Closed())

    async def _idle_timeout(self) -> None:
        if self._has_asked:
            await super()._idle_timeout()
            return
        with trio.move_on_after(REQUEST_WITHIN):
            await self.context.terminated.wait()
        with trio.CancelScope(shield=True):
            await self._initiate_server_close()

    def _send_now(self, data: bytes) -> bytes | memoryview:
        """Send what the kernel takes at once; returns the rest."""
        if self._socket.fileno() == -1:
            raise trio.ClosedResourceError  # and the descriptor may be another connection's by now
        try:
            sent = self._direct.send(data)
        except BlockingIOError:
            return data
        return memoryview(data)[sent:] if sent < len(data) else b""

    async def _send(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        with trio.CancelScope(shield=True) as scope:
            while rest:
                scope.deadline = trio.current_time() + self._stall_timeout
                rest = rest[await self._socket.send(rest) :]
        if rest:
            log.warning("client does not read; its connection is cut", seconds=self._stall_timeout)
            self.cut()
            raise trio.ClosedResourceError

    @property
    def is_open(self) -> bool:
        """Whether its socket is."""
        return self._socket.fileno() != -1

    def make_room(self) -> None:
        """Close the connection, which has no whole request."""
        self._socket.close()

    def cut(self) -> None:
        """Close the connection at once, and forget what has not been sent."""
        if self._socket.fileno() != -1:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._socket.close()


class Listener:
    """Serves an ASGI app on sockets that listen.

    Args:
        stall_timeout: seconds that a client may leave what it was sent unread.
        max_connections: how many there are at most; others wait until one of these ends.
    """

    def __init__(self, app: Any, config: Config, stall_timeout: float, max_connections: int) -> None:
        self._app = wrap_app(app, config.wsgi_max_body_size, "asgi")
        self._config = config
        self._stall_timeout = stall_timeout
        self._context = WorkerContext(None)
        self._connections: set[ClientConnection] = set()
        self._max_connections = max_connections
        self._taken = 0
        self._one_ended = trio.Event()
        self._was_full = False
        self._stop = trio.Event()

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._connections)

    def stop(self) -> None:
        """Accept no more; `serve` ends with the last response."""
        self._stop.set()

    def cut(self) -> None:
        """Close every connection at once, as for clients that do not take what is left for them."""
        for connection in list(self._connections):
            connection.cut()

    async def serve(self, sockets: Sequence[socket.socket], *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until stopped, and every connection has ended.

        Args:
            sockets: listen already; duplicates of them are used, and closed when this stops.
        """
        async with trio.open_nursery() as handlers:
            async with trio.open_nursery() as accepting:
                listeners = [Bounded(sock, self) for sock in sockets]
                accepting.start_soon(self._accept, listeners, handlers)
                task_status.started()
                await self._stop.wait()
                accepting.cancel_scope.cancel()
            await self._context.terminated.set()  # connections without a request end

    async def _accept(self, listeners: list[Bounded], handlers: trio.Nursery) -> None:
        await trio.serve_listeners(self._handle, listeners, handler_nursery=handlers)

    async def _handle(self, stream: trio.SocketStream) -> None:
        _limit_kernel_buffer(stream.socket)
        connection = ClientConnection(self._app, self._config, self._context, stream, self._stall_timeout)
        self._connections.add(connection)
        try:
            await connection
        except Exception:
            log.exception("connection failed")  # and no other
            connection.cut()
        finally:
            self._connections.discard(connection)
            self._taken -= 1
            self._one_ended.set()

    @property
    def has_room(self) -> bool:
        """Whether there may be one more connection."""
        return self._taken < self._max_connections

    async def make_room(self, sock: trio.socket.SocketType) -> None:
        """Wait until there may be one more. The one gives way that has kept us waiting for a request, or for
        more of it, for the longest time."""
        while not self.has_room:
            await trio.lowlevel.wait_readable(sock)  # nobody has to give way before somebody comes
            self._say_full()
            self._one_ended = trio.Event()
            idle = min(self._idle(), key=itemgetter(0), default=(math.inf, None))
            if idle[1] is not None and trio.current_time() - idle[0] >= UNDISTURBED:
                idle[1].make_room()
            with trio.move_on_after(UNDISTURBED):
                await self._one_ended.wait()
        self._was_full = self._was_full and self._taken > self._max_connections // 2

    def take(self) -> None:
        """There is one more."""
        self._taken += 1

    def _idle(self) -> Iterator[tuple[float, ClientConnection]]:
        for connection in self._connections:
            if connection.idle_since is not None and connection.is_open:
                yield connection.idle_since, connection

    def _say_full(self) -> None:
        """Once, until many have gone."""
        if not self._was_full:
            self._was_full = True
            log.warning(
                "as many connections as descriptors allow; those without a request give way, others wait. "
                "Raise the limit of open files, as with ulimit -n",
                connections=self._max_connections,
            )


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request's body follows its head (RFC 9112, 6.3)."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in headers
    )


def _limit_kernel_buffer(sock: trio.socket.SocketType) -> None:
    """See `UNSENT_BYTES`; without it the kernel buffers megabytes for a client that does not read."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, option, UNSENT_BYTES)
