"""Streams within a link: a host's ranks reach a rendezvous that listens on the loopback of another host."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec
import trio

from ullm.protocol.node_messages import StreamData

READ_BYTES = 1 << 16
LOOPBACK = "127.0.0.1"

SendAll = Callable[[bytes], Awaitable[None]]


class LinkedStreams:
    """The streams of one link, each known by a number.

    Args:
        send: queues a message on the link.
    """

    def __init__(self, send: Callable[[msgspec.Struct], None]) -> None:
        self._send = send
        self._streams: dict[int, LinkedStream] = {}

    def open(self, number: int) -> LinkedStream:
        """Begin a stream of that number."""
        stream = self._streams[number] = LinkedStream(number, self._send, self._streams)
        return stream

    def take(self, message: StreamData) -> None:
        """Hand bytes to the stream that they are for; one that has ended here takes none."""
        if stream := self._streams.get(message.stream):
            stream.take(message.data)


class LinkedStream:
    """One stream: what is sent here comes out at the other end of the link."""

    def __init__(
        self, number: int, send: Callable[[msgspec.Struct], None], streams: dict[int, LinkedStream]
    ) -> None:
        self._number, self._send, self._streams = number, send, streams
        self._deliver, self._delivered = trio.open_memory_channel[bytes](math.inf)

    def take(self, data: bytes) -> None:
        """Take what the other end has sent; nothing ends the stream."""
        self._deliver.send_nowait(data)

    async def send_all(self, data: bytes) -> None:
        """Queue bytes."""
        self._send(StreamData(self._number, data))

    async def receive_some(self) -> bytes:
        """Return bytes, or none at the end."""
        return await self._delivered.receive()

    def close(self) -> None:
        """End it, at both ends."""
        if self._streams.pop(self._number, None) is not None:
            self._send(StreamData(self._number, b""))


async def splice(linked: LinkedStream, there: trio.SocketStream | LinkedStream) -> None:
    """Pass bytes on in both directions, until one end ends."""

    async def forward(receive: Callable[[], Awaitable[bytes | bytearray]], send: SendAll) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await receive():
                await send(bytes(data))
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            if isinstance(there, LinkedStream):
                nursery.start_soon(forward, there.receive_some, linked.send_all)
            else:
                nursery.start_soon(forward, lambda: there.receive_some(READ_BYTES), linked.send_all)
            nursery.start_soon(forward, linked.receive_some, there.send_all)
    finally:
        linked.close()
        if isinstance(there, LinkedStream):
            there.close()
        else:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(there)


async def connect_loopback(linked: LinkedStream, port: int) -> None:
    """Connect a stream to a port of this host's loopback, and pass bytes on until one of them ends."""
    try:
        there = await trio.open_tcp_stream(LOOPBACK, port)
    except OSError:  # nobody listens any more: the other end sees the end
        return linked.close()
    await splice(linked, there)
