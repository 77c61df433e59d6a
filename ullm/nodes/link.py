"""One connection between an engine and the agent on another host: who is there, messages, and its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import msgspec
import trio

from ullm.errors import FrameBroken, HandshakeRefused, LinkLost, first_cause
from ullm.protocol.frames import FrameReader, encode
from ullm.protocol.handshake import (
    MAX_HANDSHAKE,
    Challenge,
    Handshake,
    Refusal,
    Response,
    Welcome,
    challenge,
    check_welcome,
    respond,
    welcome,
)
from ullm.protocol.messages import NotUnderstood
from ullm.release import __version__
from ullm.tls.link_tls import tls_refusal

BEATS = 5
"""Signs of life within the time after which a silent connection counts as lost, in both directions."""
LATE_SECONDS = 0.2
"""After the time for a sign of life is over: it may have come while this event loop was busy."""
HANDSHAKE_SECONDS = 10.0
"""For a handshake; whoever takes longer is let go."""
READ_BYTES = 1 << 16

M = TypeVar("M")


class Link(Generic[M]):
    """Messages over a stream, after the handshake; none is lost before the stream is.

    Args:
        stream: the connection, which `run` closes.
        language: the union of the messages that come in.
        silence: seconds without a byte after which the connection counts as lost.

    Attributes:
        beat: returns the sign of life to send.
    """

    def __init__(
        self, stream: trio.abc.Stream, language: object, silence: float, beat: Callable[[], msgspec.Struct]
    ) -> None:
        self.beat = beat
        self._stream = stream
        self._silence = silence
        self._reader: FrameReader[M] = FrameReader(language)
        self._outbox, self._to_write = trio.open_memory_channel[bytes](math.inf)

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message; those to a link that is lost go nowhere, and `run` has raised that.

        Raises:
            FrameBroken: it cannot be sent.
        """
        frame = encode(message)
        try:
            self._outbox.send_nowait(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    async def receive(self) -> M:
        """Return the next message; for the first one, before `run`.

        Raises:
            LinkLost: there is none.
        """
        while True:
            message = self._next()
            if message is not None:
                return message
            await self._read()

    async def run(self, take: Callable[[M], None]) -> None:
        """Write, read and watch, handing each message to ``take``, until the other end is gone.

        Raises:
            LinkLost: it is.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._send_beats)
                nursery.start_soon(self._take_all, take)
        except BaseExceptionGroup as group:
            raise first_cause(group) from None
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._stream)

    async def _take_all(self, take: Callable[[M], None]) -> None:
        while True:
            take(await self.receive())

    def _next(self) -> M | None:
        try:
            message = self._reader.next()
        except FrameBroken as error:
            raise LinkLost(f"sent {error}") from None
        if isinstance(message, NotUnderstood):
            raise LinkLost(f"sent a message that is not understood: {message.detail}")
        return message

    async def _read(self) -> None:
        for seconds in (self._silence, LATE_SECONDS):
            with trio.move_on_after(seconds):
                try:
                    data = await self._stream.receive_some(READ_BYTES)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise LinkLost(f"closed the connection ({error.__cause__ or error})") from None
                if not data:
                    raise LinkLost("closed the connection")
                return self._reader.feed(data)
        raise LinkLost(f"gave no sign of life for {self._silence:g} s")

    async def _write(self) -> None:
        with self._to_write:
            try:
                async for frame in self._to_write:
                    await self._stream.send_all(frame)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise LinkLost(f"closed the connection ({error.__cause__ or error})") from None

    async def _send_beats(self) -> None:
        while True:
            self.send(self.beat())
            await trio.sleep(self._silence / BEATS)


async def call(stream: trio.abc.Stream, secret: bytes) -> None:
    """Take part in a handshake as the end that has connected.

    Raises:
        HandshakeRefused: the other end lets this one not in, or is not who it should be.
        LinkLost: it is gone.
    """
    with _in_time():
        asked = await _receive(stream, Challenge)
        answer = respond(secret, asked, __version__)
        await _send(stream, answer)
        check_welcome(secret, asked, answer, await _receive(stream, Welcome, Refusal))


async def answer_call(stream: trio.abc.Stream, secret: bytes) -> None:
    """Take part in a handshake as the end that was connected to.

    Raises:
        HandshakeRefused: the caller is none, or does not know the secret; it was told.
        LinkLost: it is gone.
    """
    with _in_time():
        asked = challenge(__version__)
        await _send(stream, asked)
        try:
            reply = welcome(secret, asked, await _receive(stream, Response))
        except HandshakeRefused as error:
            await _send(stream, Refusal(str(error)))
            raise
        await _send(stream, reply)


@contextmanager
def _in_time() -> Iterator[None]:
    """Limit a handshake to `HANDSHAKE_SECONDS`; an end that goes away is lost, not refused."""
    try:
        with trio.move_on_after(HANDSHAKE_SECONDS) as scope:
            yield
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        if reason := tls_refusal(error):  # only now it shows whether the other end accepts the certificate
            raise HandshakeRefused(reason) from None
        raise LinkLost("closed the connection during the handshake") from None
    if scope.cancelled_caught:
        raise LinkLost(f"made no handshake within {HANDSHAKE_SECONDS:g} s")


async def _send(stream: trio.abc.Stream, message: Handshake) -> None:
    body = msgspec.msgpack.encode(message)
    await stream.send_all(len(body).to_bytes(2, "little") + body)


async def _receive(stream: trio.abc.Stream, *kinds: Any) -> Any:
    """Return one message of a handshake; never read further than its end."""
    length = int.from_bytes(await _exactly(stream, 2), "little")
    if length > MAX_HANDSHAKE:
        raise HandshakeRefused("that was no handshake")
    try:
        message = msgspec.msgpack.decode(await _exactly(stream, length), type=Handshake)
    except msgspec.DecodeError:
        raise HandshakeRefused("that was no handshake") from None
    if not isinstance(message, kinds):
        raise HandshakeRefused("that was another step of a handshake")
    return message


async def _exactly(stream: trio.abc.Stream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        if not more:
            raise LinkLost("closed the connection during the handshake")
        data += more
    return data
