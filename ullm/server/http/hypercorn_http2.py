"""HTTP/2 for Hypercorn's streams, in which every wait has an end and whatever a client does has its price.

Hypercorn's own protocol waits for ever for a client that grants no window, and keeps the connection's slot
then even when the client has left; it does not bound resets where connections may have any number of
requests, and fails with a traceback on requests that `h2` lets through. Of Hypercorn's, the streams are used,
which translate between requests and the ASGI app.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import trio
from h2.errors import ErrorCodes
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.events import Body, EndBody, Request, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState, TaskGroup

from ullm.logs import get_logger

log = get_logger(__name__)

MakeStream: TypeAlias = Callable[[Callable[[StreamEvent], Awaitable[None]], int], HTTPStream]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client's connection begins with (RFC 9113, 3.4)."""
STREAMS = 100
"""Requests of one connection at a time."""
HEADER_BYTES = 64 << 10
"""Size of a request's headers, uncompressed."""
UNSENT_BYTES = 32 << 10
"""Bytes of an answer that wait for the client's window before its handler does."""
AT_ONCE = 8 << 10
"""Bytes that are parsed in one turn of the event loop: some 900 of the smallest frames, about 20 ms."""
RESETS = 200
"""Requests that a client may withdraw in quick succession: all that it can have, twice."""
RESETS_PER_SECOND = 10.0
"""Requests that it may withdraw for as long as it likes."""

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET = re.compile(rb"[!-~]+")


class _Stalled(Exception):
    """The client has taken nothing of an answer for too long."""


class _Malformed(Exception):
    """A request that the protocol's library lets through, and the ASGI app could not be told."""


class ResetAllowance:
    """Says whether one more request may be withdrawn: so many at once, and so many per second (a bucket)."""

    def __init__(self) -> None:
        self._left = float(RESETS)
        self._counted_at = trio.current_time()

    def take(self) -> bool:
        """Count one; return whether it is within the allowance."""
        now = trio.current_time()
        self._left = min(RESETS, self._left + (now - self._counted_at) * RESETS_PER_SECOND) - 1
        self._counted_at = now
        return self._left >= 0


class Outbox:
    """The part of an answer's body that the client's window has not let through.

    Args:
        stall_timeout: seconds in which the client must take something.
    """

    def __init__(self, stall_timeout: float) -> None:
        self._stall_timeout = stall_timeout
        self._changed = trio.Event()
        self.unsent = bytearray()
        self.is_whole = False
        """True when nothing more will be added."""
        self.has_ended = False
        """True when the end has been sent, or nobody wants it any more."""

    def take(self, most: int) -> bytes:
        """Remove the beginning and return it."""
        data = bytes(self.unsent[:most])
        del self.unsent[:most]
        self._change()
        return data

    def end(self) -> None:
        """Note the end; whoever waits goes on."""
        self.has_ended = True
        self.unsent.clear()
        self._change()

    async def wait_for_room(self) -> None:
        """Wait until a further piece may be added.

        Raises:
            _Stalled: the client has taken nothing for too long.
        """
        while len(self.unsent) > UNSENT_BYTES and not self.has_ended:
            await self._wait_for_a_change()

    async def wait_for_the_end(self) -> None:
        """Wait until everything has been sent.

        Raises:
            _Stalled: likewise.
        """
        while not self.has_ended:
            await self._wait_for_a_change()

    async def _wait_for_a_change(self) -> None:
        with trio.move_on_after(self._stall_timeout) as scope:
            await self._changed.wait()
        if scope.cancelled_caught:
            raise _Stalled

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


@dataclass
class _Exchange:
    """A request and its answer."""

    http: HTTPStream
    outbox: Outbox
    has_arrived: bool = field(default=False)


class Http2Protocol:
    """One connection's HTTP/2, in the place of Hypercorn's ``H2Protocol``.

    Args:
        make_stream: makes a stream of Hypercorn's from a function that sends its events, and its number.
        send: sends bytes and notes the connection's state; a send that makes no progress ends it.
        stall_timeout: seconds after which an answer is given up of which the client takes nothing.
    """

    def __init__(
        self,
        make_stream: MakeStream,
        config: Config,
        context: WorkerContext,
        task_group: TaskGroup,
        send: Callable[[Event], Awaitable[None]],
        stall_timeout: float,
    ) -> None:
        self._make_stream = make_stream
        self._config = config
        self._context = context
        self._task_group = task_group
        self._send = send
        self._stall_timeout = stall_timeout
        self._is_closed = False
        self._has_complained = False
        self._exchanges: dict[int, _Exchange] = {}
        self._resets = ResetAllowance()
        self._wake = trio.Event()
        self._connection = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding=None)
        )
        self._connection.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: HEADER_BYTES,
            },
        )

    async def initiate(self) -> None:
        """Send the settings and begin to send answers."""
        self._connection.initiate_connection()
        await self._flush()
        self._task_group.spawn(self._send_bodies)

    async def handle(self, event: Event) -> None:
        """Take what the client has sent, or the end of the connection."""
        if isinstance(event, Closed):
            self._is_closed = True
            self._wake.set()
            for stream_id in list(self._exchanges):
                await self._drop(stream_id)
        elif isinstance(event, RawData):
            for begin in range(0, len(event.data), AT_ONCE):
                if self._is_closed:
                    return
                await self._receive(event.data[begin : begin + AT_ONCE])
                await trio.lowlevel.checkpoint()

    async def farewell(self) -> None:
        """Tell the client that further requests need another connection."""
        await self._close(ErrorCodes.NO_ERROR)

    async def stream_send(self, event: StreamEvent) -> None:
        """Send a part of an answer; called by its stream."""
        exchange = self._exchanges.get(event.stream_id)
        if exchange is None:
            return  # the client has left, or withdrawn the request
        try:
            await self._answer(exchange, event)
        except h2.exceptions.ProtocolError:
            return  # likewise, noticed later
        except _Stalled:
            log.warning("client does not read; its stream is reset", seconds=self._stall_timeout)
            await self._reset(event.stream_id, ErrorCodes.CANCEL)

    # --- what comes in -------------------------------------------------------------------------------

    async def _receive(self, data: bytes) -> None:
        try:
            events = self._connection.receive_data(data)
        except h2.exceptions.ProtocolError as error:
            self._complain("malformed HTTP/2; the connection is closed", error)
            await self._flush()  # the farewell that h2 has prepared
            await self._send(Closed())
            return
        for event in events:
            if not self._is_closed:
                await self._handle(event)
        await self._flush()

    async def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            await self._begin(event)
        elif isinstance(event, h2.events.DataReceived):
            exchange = self._exchanges.get(event.stream_id)
            if exchange is not None:
                await exchange.http.handle(Body(event.stream_id, event.data))
            with suppress(h2.exceptions.ProtocolError):  # the client has ended the connection since
                self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            exchange = self._exchanges.get(event.stream_id)
            if exchange is not None:
                exchange.has_arrived = True
                await exchange.http.handle(EndBody(event.stream_id))
        elif isinstance(event, h2.events.StreamReset):
            await self._withdrawn(event.stream_id)
        elif isinstance(event, h2.events.ConnectionTerminated):
            await self._send(Closed())
        else:  # the windows may have grown; priorities are not kept (RFC 9113, 5.3.2)
            self._wake.set()

    async def _begin(self, event: h2.events.RequestReceived) -> None:
        stream_id = event.stream_id
        if self._context.terminated.is_set():
            await self._reset(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        try:
            request = _request(event)
        except _Malformed as error:
            self._complain("malformed HTTP/2 request; its stream is reset", error)
            await self._reset(stream_id, ErrorCodes.PROTOCOL_ERROR)
            await self._withdrawn(stream_id)
            return
        await self._send(Updated(idle=False))
        exchange = _Exchange(self._make_stream(self.stream_send, stream_id), Outbox(self._stall_timeout))
        self._exchanges[stream_id] = exchange
        await exchange.http.handle(request)

    async def _withdrawn(self, stream_id: int) -> None:
        """Drop a request that the client has withdrawn, or has had reset by an error."""
        await self._drop(stream_id)
        if self._resets.take():
            await self._note_idleness()
        elif not self._is_closed:
            log.warning("client resets too many streams; its connection is closed", resets=RESETS)
            await self._close(ErrorCodes.ENHANCE_YOUR_CALM)

    def _complain(self, what: str, cause: Exception) -> None:
        """Log the client's mistake, once per connection."""
        if not self._has_complained:
            self._has_complained = True
            log.warning(what, cause=str(cause)[:200])

    # --- what goes out -------------------------------------------------------------------------------

    async def _answer(self, exchange: _Exchange, event: StreamEvent) -> None:
        stream_id, outbox = event.stream_id, exchange.outbox
        if isinstance(event, Response):
            status = (b":status", b"%d" % event.status_code)
            headers = [status, *event.headers, *self._config.response_headers("h2")]
            self._connection.send_headers(stream_id, headers)
            await self._flush()
        elif isinstance(event, Body):
            outbox.unsent += event.data
            self._wake.set()
            await outbox.wait_for_room()
        elif isinstance(event, EndBody):
            outbox.is_whole = True
            self._wake.set()
            await outbox.wait_for_the_end()
        elif isinstance(event, StreamClosed):
            await self._drop(stream_id)
            if not exchange.has_arrived:  # the rest of it is of no use (RFC 9113, 8.1)
                self._connection.reset_stream(stream_id, ErrorCodes.NO_ERROR)
                await self._flush()
            await self._note_idleness()

    async def _send_bodies(self) -> None:
        """Send what the windows let through, a frame of each answer in turn, until the end."""
        while not self._is_closed:
            wake = self._wake = trio.Event()
            frames = [self._put_frame(*pair) for pair in list(self._exchanges.items())]
            if any(frames):
                await self._flush()
                await trio.lowlevel.checkpoint()
            else:
                await wake.wait()

    def _put_frame(self, stream_id: int, exchange: _Exchange) -> bool:
        """Hand the next frame of an answer to h2, if its windows let one through."""
        outbox = exchange.outbox
        try:
            if outbox.is_whole and not outbox.unsent and not outbox.has_ended:
                self._connection.end_stream(stream_id)  # needs no window
                outbox.end()
                return True
            room = min(
                self._connection.local_flow_control_window(stream_id),
                self._connection.max_outbound_frame_size,
            )
            if room <= 0 or not outbox.unsent:
                return False
            self._connection.send_data(stream_id, outbox.take(room))
        except h2.exceptions.ProtocolError:  # reset or closed meanwhile; the handler is told elsewhere
            outbox.end()
            return False
        return True

    async def _flush(self) -> None:
        """Send what h2 has prepared, wholly: half a frame would spoil all streams."""
        with trio.CancelScope(shield=True):  # each send ends when it makes no progress
            if data := self._connection.data_to_send():
                await self._send(RawData(data))

    # --- ends ----------------------------------------------------------------------------------------

    async def _drop(self, stream_id: int) -> None:
        """Forget a request; its handler is told that the client has left, unless it has finished."""
        exchange = self._exchanges.pop(stream_id, None)
        if exchange is not None:
            exchange.outbox.end()
            await exchange.http.handle(StreamClosed(stream_id))

    async def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        await self._drop(stream_id)
        with suppress(h2.exceptions.ProtocolError):  # it has ended before
            self._connection.reset_stream(stream_id, code)
        await self._flush()
        await self._note_idleness()

    async def _note_idleness(self) -> None:
        if self._exchanges or self._is_closed:
            return
        if self._context.terminated.is_set():
            await self.farewell()
        await self._send(Updated(idle=True))

    async def _close(self, code: ErrorCodes) -> None:
        if self._is_closed:
            return
        with suppress(h2.exceptions.ProtocolError):
            self._connection.close_connection(code)
        await self._flush()
        await self._send(Closed())


def _request(event: h2.events.RequestReceived) -> Request:
    """Return a request that h2 has checked, as Hypercorn's streams take it.

    Raises:
        _Malformed: a method or path that HTTP does not allow.
    """
    received = [(bytes(name), bytes(value)) for name, value in event.headers]
    pseudo = {name: value for name, value in received if name.startswith(b":")}
    headers = [(name, value) for name, value in received if not name.startswith(b":")]
    if b":authority" in pseudo:
        headers = [(b"host", pseudo[b":authority"]), *(pair for pair in headers if pair[0] != b"host")]
    method = pseudo.get(b":method", b"")
    target = pseudo.get(b":path", b"*")  # CONNECT has none (RFC 9113, 8.5)
    for name, value, allowed in ((":method", method, _TOKEN), (":path", target, _TARGET)):
        if not allowed.fullmatch(value):
            raise _Malformed(f"{name} is {value[:100]!r}")
    state = ConnectionState(LifespanState())
    return Request(event.stream_id, headers, "2", method.decode().upper(), target, state)


class GreetedProtocol(ProtocolWrapper):
    """The protocol that a client speaks; its first bytes tell where nothing was agreed on.

    Args:
        choose: makes the protocol and begins it; its argument says whether it is HTTP/2.
        http2: what was agreed on, if anything.
    """

    def __init__(
        self, choose: Callable[[bool], Awaitable[H11Protocol | Http2Protocol]], http2: bool | None
    ) -> None:
        self._choose = choose
        self._http2 = http2
        self._greeting = b""
        self._chosen: H11Protocol | Http2Protocol | None = None

    async def handle(self, event: Event) -> None:
        """Take what the client has sent, or the end of the connection."""
        if self._chosen is None and isinstance(event, RawData):
            self._greeting += event.data
            undecided = event.data and PREFACE.startswith(self._greeting) and self._greeting != PREFACE
            if self._http2 is None and undecided:
                return
            is_http2 = self._greeting.startswith(PREFACE) if self._http2 is None else self._http2
            self._chosen = await self._choose(is_http2)
            event = RawData(self._greeting)
        if self._chosen is not None:
            await self._chosen.handle(event)

    async def farewell(self) -> None:
        """Tell a client of HTTP/2 that further requests need another connection."""
        if isinstance(self._chosen, Http2Protocol):
            await self._chosen.farewell()
