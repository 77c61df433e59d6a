"""Any transport, with faults: what an injector decides is carried out on the way to and from a worker.

What shall happen in a worker is told to it by an `Inject` just before the message that it concerns.
Frames are dropped, doubled, delayed and corrupted here; on a pipe, corrupt frames are bytes that the
other side really reads. Where nothing is armed, this costs one call per message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, cast, runtime_checkable

import trio

from ullm.actors.transports.base import OpenTransport, StopReport, Transport, WorkerSpec
from ullm.errors import FrameBroken, WorkerLost
from ullm.faults import Fault, FaultInjector
from ullm.faults.injector import Site
from ullm.protocol import stop_budget
from ullm.protocol.frames import encode
from ullm.protocol.messages import (
    FromWorker,
    Inject,
    Ping,
    Prepare,
    RankSpec,
    Sleep,
    Start,
    Step,
    ToWorker,
    Wake,
)

NO_MSGPACK = b"\xc1"
"""The one byte that msgpack never uses."""


@runtime_checkable
class Pipe(Protocol):
    """A transport that carries bytes."""

    async def send_bytes(self, frame: bytes) -> None:
        """Send bytes instead of a message."""

    def unread(self, data: bytes) -> None:
        """Have these bytes read next."""


def faulty(open_transport: OpenTransport, injector: FaultInjector) -> OpenTransport:
    """Start workers in the same way, with the injector's faults."""

    @asynccontextmanager
    async def open_faulty(spec: WorkerSpec) -> AsyncIterator[Transport]:
        async with open_transport(spec) as transport:
            yield FaultyTransport(transport, spec.rank, injector)

    return open_faulty


def garbled(message: ToWorker | FromWorker) -> bytes:
    """A frame of the right length that says nothing."""
    frame = encode(message)
    return frame[:4] + NO_MSGPACK * (len(frame) - 4)


class FaultyTransport:
    """See `Transport`."""

    def __init__(self, inner: Transport, rank: RankSpec, injector: FaultInjector) -> None:
        self._inner = inner
        self._rank = rank
        self._injector = injector
        self._held: deque[tuple[float, FromWorker]] = deque()
        self._doomed = False

    @property
    def name(self) -> str:
        """As in logs; a standby worker gets the name of the one whose place it takes."""
        return self._inner.name

    @name.setter
    def name(self, name: str) -> None:
        cast(Any, self._inner).name = name

    @property
    def pid(self) -> int | None:
        """The worker's process id."""
        return self._inner.pid

    def alive(self) -> bool:
        """Whether the worker has not ended."""
        return self._inner.alive()

    def suspended(self) -> bool:
        """Whether the operating system has suspended it."""
        return self._inner.suspended()

    def kill(self) -> None:
        """End the worker now."""
        self._inner.kill()

    def send(self, message: ToWorker) -> Coroutine[Any, Any, None]:
        """Send one message, or what becomes of it."""
        if type(message) is Start:
            self._rank = message.rank  # a standby worker learns only now who it is
        return self._send(message) if self._injector.armed else self._inner.send(message)

    async def receive(self) -> FromWorker:
        """The next message, or what becomes of it."""
        while not self._held:
            message = await self._inner.receive()
            if not self._injector.armed:
                return message
            faults = self._injector.fire(self._site("frame.from_worker", message))
            if not faults:
                return message
            self._hold(message, faults)
        due, message = self._held[0]
        await trio.sleep_until(due)
        self._held.popleft()
        return message

    async def stop(self, budget: float) -> StopReport:
        """As the transport does, with a worker that misbehaves when it shall stop."""
        began = trio.current_time()
        if self._injector.armed and self.alive():
            with trio.move_on_after(stop_budget.FAULT_SHARE * budget):
                await self._misbehave("worker.stop")
        return await self._inner.stop(max(0.0, began + budget - trio.current_time()))

    async def _send(self, message: ToWorker) -> None:
        point = _point(message)
        if point is None or not await self._misbehave(point):
            return await self._send_frame(message)
        with suppress(WorkerLost):  # that is what was wanted; `receive` says how it came
            await self._send_frame(message)

    async def _send_frame(self, message: ToWorker) -> None:
        copies, corrupt = 1, False
        for fault in self._injector.fire(self._site("frame.to_worker", message)):
            match fault.action:
                case "drop":
                    copies = 0
                case "duplicate":
                    copies *= 2
                case "delay":
                    await trio.sleep(fault.duration)
                case "corrupt":
                    corrupt = True
        for _ in range(copies):
            await (self._send_garbled(message) if corrupt else self._inner.send(message))

    async def _misbehave(self, point: str) -> bool:
        """Tell the worker what to do to itself; whether there is anything.

        One that is lost by that hits no further point: what it is still sent, it never carries out.
        """
        faults = [] if self._doomed else self._injector.fire(self._site(point))
        self._doomed |= any(fault.fatal for fault in faults)
        with suppress(WorkerLost):
            for fault in faults:
                await self._inner.send(Inject(fault.action, fault.duration))
        return bool(faults)

    async def _send_garbled(self, message: ToWorker) -> None:
        if isinstance(self._inner, Pipe):
            return await self._inner.send_bytes(garbled(message))
        # A queue carries values, and this is the one that a reader of bytes would have put there.
        await self._inner.send(cast(ToWorker, FrameBroken("a frame that is not msgpack: injected fault")))

    def _hold(self, message: FromWorker, faults: list[Fault]) -> None:
        """Keep what comes out of a message, until it is due; a receiver that is cancelled loses nothing."""
        copies, due = 1, trio.current_time()
        for fault in faults:
            match fault.action:
                case "drop":
                    copies = 0
                case "duplicate":
                    copies *= 2
                case "delay":
                    due += fault.duration
                case "corrupt":
                    return self._unread_garbled(message)
        self._held.extend([(due, message)] * copies)

    def _unread_garbled(self, message: FromWorker) -> None:
        if isinstance(self._inner, Pipe):
            return self._inner.unread(garbled(message))
        self._inner.kill()
        raise WorkerLost(self.name, "sent a frame that is not msgpack: injected fault")

    def _site(self, point: str, message: ToWorker | FromWorker | None = None) -> Site:
        kind = type(message).__name__ if message is not None else None
        return Site(point, self._rank.replica, self._rank.rank, self._rank.epoch, kind)


def _point(message: ToWorker) -> str | None:
    """The point that a message hits in the worker; `Stop` is sent by the transport itself."""
    match message:
        case Step():
            return "worker.step"
        case Ping():
            return "worker.ping"
        case Start():
            return "worker.start"
        case Prepare():
            return "worker.prepare"
        case Sleep():
            return "worker.sleep"
        case Wake():
            return "worker.wake"
    return None
