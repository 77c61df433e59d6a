"""Fault injection around any transport: carries out what an injector decides about messages and workers.

Faults in a worker are sent to it as `Inject`, just before the message that they concern. Frames are dropped,
duplicated, delayed and corrupted here; on a pipe, a corrupt frame is bytes that the other side really reads.
While nothing is armed, this costs one call per message.
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
from ullm.faults.injector import FaultSite
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
"""The only byte that msgpack never uses."""


@runtime_checkable
class Pipe(Protocol):
    """A transport that carries bytes."""

    async def send_bytes(self, frame: bytes) -> None:
        """Send bytes that need not be a valid frame."""

    def unread(self, data: bytes) -> None:
        """Put bytes in front of those still to be read."""


def faulty(open_transport: OpenTransport, injector: FaultInjector) -> OpenTransport:
    """Return a function that starts workers in the same way, with the injector's faults."""

    @asynccontextmanager
    async def open_faulty(spec: WorkerSpec) -> AsyncIterator[Transport]:
        async with open_transport(spec) as transport:
            yield FaultyTransport(transport, spec.rank, injector)

    return open_faulty


def garbled(message: ToWorker | FromWorker) -> bytes:
    """Return a frame of the right length without valid content."""
    frame = encode(message)
    return frame[:4] + NO_MSGPACK * (len(frame) - 4)


class FaultyTransport:
    """A transport with faults; see `Transport`."""

    def __init__(self, inner: Transport, rank: RankSpec, injector: FaultInjector) -> None:
        self._inner = inner
        self._rank = rank
        self._injector = injector
        self._held: deque[tuple[float, FromWorker]] = deque()
        self._doomed = False

    @property
    def name(self) -> str:
        """The worker's name, as in logs; a standby worker gets the name of the worker that it replaces."""
        return self._inner.name

    @name.setter
    def name(self, name: str) -> None:
        cast(Any, self._inner).name = name

    @property
    def pid(self) -> int | None:
        """The worker's process id."""
        return self._inner.pid

    def alive(self) -> bool:
        """Whether the worker runs."""
        return self._inner.alive()

    def suspended(self) -> bool:
        """Whether the operating system has suspended it."""
        return self._inner.suspended()

    def kill(self) -> None:
        """End the worker now."""
        self._inner.kill()

    def send(self, message: ToWorker) -> Coroutine[Any, Any, None]:
        """Send one message, subject to faults."""
        if type(message) is Start:
            self._rank = message.rank  # only now does a standby worker get its rank
        return self._send(message) if self._injector.armed else self._inner.send(message)

    async def receive(self) -> FromWorker:
        """Return the next message, subject to faults."""
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
        """Stop the worker, after the faults of ``worker.stop``."""
        began = trio.current_time()
        if self._injector.armed and self.alive():
            with trio.move_on_after(stop_budget.FAULT_SHARE * budget):
                await self._misbehave("worker.stop")
        return await self._inner.stop(max(0.0, began + budget - trio.current_time()))

    async def _send(self, message: ToWorker) -> None:
        point = _point(message)
        if point is None or not await self._misbehave(point):
            return await self._send_frame(message)
        with suppress(WorkerLost):  # intended by the fault; `receive` reports it
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
        """Send the worker the faults of a point; return whether there are any.

        A worker that a fault will end hits no further point, because it carries out nothing else.
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
        # A queue carries values; this is the one that a reader of bytes would have put there.
        await self._inner.send(cast(ToWorker, FrameBroken("a frame that is not msgpack: injected fault")))

    def _hold(self, message: FromWorker, faults: list[Fault]) -> None:
        """Keep a message with faults until it is due, so that a cancelled receiver loses nothing."""
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

    def _site(self, point: str, message: ToWorker | FromWorker | None = None) -> FaultSite:
        kind = type(message).__name__ if message is not None else None
        return FaultSite(point, self._rank.replica, self._rank.rank, self._rank.epoch, kind)


def _point(message: ToWorker) -> str | None:
    """Return the point that a message hits in the worker; the transport itself sends `Stop`."""
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
