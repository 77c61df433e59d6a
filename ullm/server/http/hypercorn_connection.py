"""Connections served by Hypercorn, with an end for those whose client does not read.

Hypercorn's own server sends within a shield, without a limit, and does not say which connections it has:
one client that stops reading would hold up its request, and the stop of the server, for good. Here a send
that makes no progress for a while ends its connection, and every connection can be cut at once.

This is the only module that depends on Hypercorn's private names; tests/server/test_private_names.py lists
them.
"""

from __future__ import annotations

import enum
import socket
import struct
import sys
from collections.abc import Iterable
from typing import Any, cast

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, LifespanState
from hypercorn.utils import wrap_app

from ullm.logs import get_logger
from ullm.server.http.sse import CHUNKS
from ullm.server.http.tls import TlsStream

log = get_logger(__name__)

KEEP_ALIVE = 75.0
"""Seconds that an idle connection stays open; longer than the usual load balancer's 60."""
REQUEST_WITHIN = 20.0
"""Seconds from the beginning of a connection to the end of its first request's head."""
TLS_RECORD = 16 << 10
"""Bytes that are encrypted and sent at a time; each piece that the client reads is progress."""
_RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
"""Value of SO_LINGER: forget what has not been sent, and tell the client with a reset."""


class HypercornWorker:
    """Settings that the connections of a listener share, as Hypercorn wants them.

    Args:
        stall_timeout: seconds without progress after which a send ends its connection.
    """

    def __init__(self, app: Any, stall_timeout: float) -> None:
        self.config = _config()
        self.app = wrap_app(app, self.config.wsgi_max_body_size, "asgi")
        self.context = WorkerContext(None)
        self.stall_timeout = stall_timeout

    async def terminate(self) -> None:
        """End the connections that have no request."""
        await self.context.terminated.set()


def _config() -> Config:
    """Hypercorn's settings for a connection: no access log; no limits of its own."""
    config = Config()
    config.accesslog = None
    config.errorlog = None
    config.keep_alive_timeout = KEEP_ALIVE
    config.keep_alive_max_requests = sys.maxsize
    config.include_server_header = False
    return config


class ConnectionState(enum.Enum):
    """State of a connection."""

    NEW = enum.auto()
    """Has not sent the head of a request yet."""
    ACTIVE = enum.auto()
    """Has a request, whose body may still be arriving."""
    IDLE = enum.auto()
    """Waits for its next request."""
    CLOSED = enum.auto()
    """The client has disconnected, or the server has closed the connection."""


class HypercornConnection(TCPServer):
    """One connection; a send ends it when the client stops reading."""

    def __init__(self, worker: HypercornWorker, stream: trio.SocketStream | TlsStream) -> None:
        super().__init__(worker.app, worker.config, worker.context, LifespanState(), stream)  # type: ignore[arg-type]  # takes either
        self._tls = stream if isinstance(stream, TlsStream) else None
        transport = stream.transport_stream if isinstance(stream, TlsStream) else stream
        self._socket = sock = transport.socket
        # The same descriptor, to send without a turn of the event loop where the kernel has room.
        self._direct = socket.socket(sock.family, sock.type, sock.proto, sock.fileno())
        self.app = cast(AppWrapper, self._call_app)  # Hypercorn calls this one instead
        self._app = worker.app
        self._stall_timeout = worker.stall_timeout
        self._state = ConnectionState.NEW
        self._waiting_since: float | None = trio.current_time()

    @property
    def waiting_since(self) -> float | None:
        """Trio time since which it owes a whole request; None while it has one, or is closed.

        That is when the connection was opened, its last request ended, or the last piece of a body arrived.
        """
        return None if self._state is ConnectionState.CLOSED or not self._is_open else self._waiting_since

    def give_way(self) -> None:
        """Close the connection, which owes a request, in favour of another."""
        self._state = ConnectionState.CLOSED
        self._socket.close()

    def cut(self) -> None:
        """Close the connection at once, and forget what has not been sent."""
        self._state = ConnectionState.CLOSED
        if self._is_open:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._socket.close()

    async def send_chunk(self, data: bytes) -> None:
        """Send a piece of a body in chunked encoding (RFC 9112, 7.1).

        In HTTP/1.1 that is how h11 sends a body without a length. Through the events of Hypercorn and h11,
        which keep no state about pieces, the same would cost more than the sending itself.
        """
        await self._send_bytes(b"%x\r\n%b\r\n" % (len(data), data))

    # --- in place of Hypercorn's own methods ---------------------------------------------------------

    async def run(self) -> None:
        """Serve the connection until it ends."""
        try:
            if self._tls is None or await _shake_hands(self._tls):
                await super().run()
        finally:
            self._direct.detach()
            self._socket.close()  # Hypercorn leaves it open where a handshake fails
            # These refer back to the connection, so that only the garbage collector would free it.
            self.__dict__.pop("protocol", None)
            self.__dict__.pop("app", None)

    async def protocol_send(self, event: Event) -> None:
        """Send bytes, or note the connection's state. Called by Hypercorn's protocol.

        A send cannot be cancelled: half a piece would spoil the pieces after it.
        """
        if isinstance(event, RawData):
            await self._send_bytes(event.data)
        elif not isinstance(event, Updated):
            await super().protocol_send(event)
        elif self._state is not ConnectionState.CLOSED:
            self._state = ConnectionState.IDLE if event.idle else ConnectionState.ACTIVE
            self._waiting_since = trio.current_time() if event.idle else None
            await super().protocol_send(event)

    async def _read_data(self) -> None:
        # Hypercorn would keep the socket of a client that has left until the idle timeout.
        try:
            await super()._read_data()
        finally:
            self._state = ConnectionState.CLOSED
            await self.idle_task.stop()

    async def _idle_timeout(self) -> None:
        if self._state is not ConnectionState.NEW:
            await super()._idle_timeout()
            return
        with trio.move_on_after(REQUEST_WITHIN):
            await self.context.terminated.wait()
        with trio.CancelScope(shield=True):
            await self._initiate_server_close()

    async def _call_app(self, scope: Any, receive: Any, *others: Any) -> None:
        """Call the app, with `send_chunk` as an extension; note when a body is still arriving."""
        if scope["type"] == "http" and scope["http_version"] == "1.1":
            scope["extensions"][CHUNKS] = self.send_chunk

        async def receive_and_note() -> Any:
            message = await receive()
            if message["type"] == "http.request":
                self._waiting_since = trio.current_time() if message.get("more_body") else None
            return message

        if scope["type"] == "http" and _has_body(scope["headers"]):
            self._waiting_since = trio.current_time()
        await self._app(scope, receive_and_note, *others)

    # --- sending -------------------------------------------------------------------------------------

    async def _send_bytes(self, data: bytes) -> None:
        try:
            rest = data if self._tls or self.send_lock.locked() else self._send_now(data)
            if rest:
                async with self.send_lock:
                    await self._send(rest)
        except (
            OSError,
            trio.ClosedResourceError,
            trio.BrokenResourceError,
        ):  # the client has left, or the connection was cut
            await self.protocol.handle(Closed())

    def _send_now(self, data: bytes) -> bytes | memoryview:
        """Send what the kernel takes at once; return the rest."""
        if not self._is_open:
            raise trio.ClosedResourceError  # the descriptor may be another connection's by now
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
                rest = rest[await self._send_some(rest) :]
        if rest:
            log.warning("client does not read; its connection is cut", seconds=self._stall_timeout)
            self.cut()
            raise trio.ClosedResourceError

    async def _send_some(self, data: memoryview) -> int:
        """Send the beginning of the data; return its length."""
        if self._tls is None:
            return await self._socket.send(data)
        piece = data[:TLS_RECORD]
        await self._tls.send_all(piece)
        return len(piece)

    @property
    def _is_open(self) -> bool:
        return self._socket.fileno() != -1


async def _shake_hands(tls: TlsStream) -> bool:
    """Return True if the client agrees on TLS in time."""
    with trio.move_on_after(REQUEST_WITHIN):
        try:
            await tls.do_handshake()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return True
    return False


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return True if a body follows the head of a request (RFC 9112, 6.3)."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in headers
    )
