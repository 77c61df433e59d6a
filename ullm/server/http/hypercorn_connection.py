"""Connections served by Hypercorn, with an end for those whose client does not read.

Hypercorn's own server sends within a shield, without a limit, and does not say which connections it has:
one client that stops reading would hold up its request, and the stop of the server, for good. Here a send
that makes no progress for a while ends its connection, and every connection can be cut at once.

Only this module and its neighbours ``hypercorn_http1`` and ``hypercorn_http2`` depend on Hypercorn's private
names; tests/server/test_private_names.py lists them.
"""

from __future__ import annotations

import enum
import socket
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.task_group import TaskGroup, _handle
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, LifespanState
from hypercorn.typing import ConnectionState as Shared
from hypercorn.utils import parse_socket_addr, wrap_app

from ullm.logs import get_logger
from ullm.server.http.faulty import CUT
from ullm.server.http.hypercorn_http1 import Http1Protocol
from ullm.server.http.hypercorn_http2 import GreetedProtocol, Http2Protocol
from ullm.server.http.sse import CHUNKS
from ullm.server.http.tls import TlsStream

log = get_logger(__name__)

KEEP_ALIVE = 75.0
"""Seconds that an idle connection stays open; longer than the usual load balancer's 60."""
REQUEST_WITHIN = 20.0
"""Seconds from the beginning of a connection to the end of its first request's head."""
LAST_REQUEST_WITHIN = 0.1
"""Seconds that a connection without a request has at a stop: one may be on its way, and gets an answer."""
TLS_RECORD = 16 << 10
"""Bytes that are encrypted and sent at a time; each piece that the client reads is progress."""
_RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
"""Value of SO_LINGER: forget what has not been sent, and tell the client with a reset."""


class HypercornWorker:
    """Settings that the connections of a listener share, as Hypercorn wants them.

    Args:
        stall_timeout: seconds without progress after which a send ends its connection.
        http2: whether clients may speak HTTP/2, too.
    """

    def __init__(self, app: Any, stall_timeout: float, *, http2: bool = False) -> None:
        self.config = _config()
        self.app = wrap_app(app, self.config.wsgi_max_body_size, "asgi")
        self.context = WorkerContext(None)
        self.stall_timeout = stall_timeout
        self.http2 = http2

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


class Tasks(TaskGroup):
    """The tasks of a connection: its requests' handlers. What comes for one that has ended is dropped.

    Hypercorn would wait for it to be taken, for ever, and read nothing more from the connection.
    """

    async def spawn_app(self, app: Any, config: Config, scope: Any, send: Any) -> Any:
        """Call the app for a request; return a function that tells it what the client sends."""
        told, receiver = trio.open_memory_channel[Any](config.max_app_queue_size)

        async def run() -> None:
            with receiver:
                await _handle(
                    app, config, scope, receiver.receive, send, trio.to_thread.run_sync, trio.from_thread.run
                )

        async def tell(message: Any) -> None:
            with suppress(trio.BrokenResourceError):
                await told.send(message)

        self.spawn(run)
        return tell


class HypercornConnection(TCPServer):
    """One connection; a send ends it when the client stops reading."""

    protocol: GreetedProtocol

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
        self._http2 = worker.http2
        self._state = ConnectionState.NEW
        self._whole_requests = 0
        self._waiting_since = trio.current_time()

    @property
    def waiting_since(self) -> float | None:
        """Trio time since which it owes a whole request; None while it has one, or is closed.

        That is when the connection was opened, its last request ended, or the last piece of one arrived.
        """
        closed = self._state is ConnectionState.CLOSED or not self._is_open
        return None if closed or self._whole_requests else self._waiting_since

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
                await self._serve()
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
            self._waiting_since = trio.current_time()
            await super().protocol_send(event)

    async def _serve(self) -> None:
        try:
            family = self._socket.family
            self._ends = tuple(
                parse_socket_addr(family, address)
                for address in (self._socket.getpeername(), self._socket.getsockname())
            )
            async with Tasks() as tasks:
                self._task_group = tasks
                self.protocol = GreetedProtocol(self._choose, self._agreed_on_http2())
                await self.idle_task.restart(tasks, self._idle_timeout)
                await self._read_data()
        except OSError:
            return  # the client has left
        finally:
            await self._close()

    def _agreed_on_http2(self) -> bool | None:
        """Return whether the client speaks HTTP/2, or None if its first bytes will tell."""
        if self._tls is not None:
            return self._tls.selected_alpn_protocol() == "h2"
        return None if self._http2 else False

    async def _choose(self, http2: bool) -> H11Protocol | Http2Protocol:
        """Make the protocol that the client speaks, and begin it."""
        tasks, encrypted = self._task_group, self._tls is not None
        client, server = self._ends

        def make_stream(send: Any, number: int) -> HTTPStream:
            return HTTPStream(
                self.app, self.config, self.context, tasks, encrypted, client, server, send, number
            )

        if http2:
            protocol = Http2Protocol(
                make_stream, self.config, self.context, tasks, self.protocol_send, self._stall_timeout
            )
            await protocol.initiate()
            return protocol
        return Http1Protocol(
            *(self.app, self.config, self.context, tasks, Shared(self.state)),
            *(encrypted, client, server, self.protocol_send),
        )

    async def _read_data(self) -> None:
        # Hypercorn would keep the socket of a client that has left until the idle timeout.
        try:
            await super()._read_data()
        finally:
            self._state = ConnectionState.CLOSED
            await self.idle_task.stop()

    async def _idle_timeout(self) -> None:
        limit = REQUEST_WITHIN if self._state is ConnectionState.NEW else self.config.keep_alive_timeout
        with trio.move_on_after(limit):
            await self.context.terminated.wait()
            await trio.sleep(LAST_REQUEST_WITHIN)
        await self._initiate_server_close()

    async def _initiate_server_close(self) -> None:
        with trio.CancelScope(shield=True):  # each send ends when it makes no progress
            await self.protocol.farewell()
            await super()._initiate_server_close()

    async def _call_app(self, scope: Any, receive: Any, *others: Any) -> None:
        """Call the app, with `send_chunk` as an extension; note when all of the request has arrived."""
        if scope["type"] == "http" and scope["http_version"] == "1.1":
            scope["extensions"][CHUNKS] = self.send_chunk
            scope["extensions"][CUT] = self.cut
        is_whole = scope["type"] != "http" or not _has_body(scope["headers"])

        def note(arrived: bool) -> None:
            nonlocal is_whole
            self._waiting_since = trio.current_time()
            self._whole_requests += arrived and not is_whole
            is_whole = is_whole or arrived

        async def receive_and_note() -> Any:
            message = await receive()
            if message["type"] == "http.request":
                note(arrived=not message.get("more_body"))
            return message

        self._waiting_since = trio.current_time()
        self._whole_requests += is_whole
        try:
            await self._app(scope, receive_and_note, *others)
        finally:
            self._whole_requests -= is_whole

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
