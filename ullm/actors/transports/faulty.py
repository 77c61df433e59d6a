"""Fault injection around any transport: carries out what an injector decides about messages and workers.

Faults in a worker are sent to it as `Inject`, just before the message that they concern. Frames are dropped,
duplicated, delayed and corrupted here; on a pipe, a corrupt frame is bytes that the other side really reads.
While nothing is armed, this costs one call per message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import trio

from ullm.actors.transports.base import OpenTransport, Pipe, StopReport, Transport, WorkerSpec
from ullm.errors import FrameBroken, WorkerLost
from ullm.faults import FaultInjector
from ullm.faults.injector import FaultSite, Firing
from ullm.protocol import stop_budget
from ullm.protocol.frames import encode
from ullm.protocol.messages import (
    ExportBlocks,
    Failed,
    FromWorker,
    ImportBlocks,
    Inject,
    Ping,
    Prepare,
    RankSpec,
    Ready,
    Sleep,
    Start,
    Step,
    ToWorker,
    Wake,
)

NO_MSGPACK = b"\xc1"
"""The only byte that msgpack never uses."""

_DONE = {"drop": "dropped", "duplicate": "sent twice", "delay": "delayed", "corrupt": "garbled"}
"""What is told of a frame that a fault has treated so."""


def faulty(open_transport: OpenTransport, injector: FaultInjector) -> OpenTransport:
    """Return a function that starts workers in the same way, with the injector's faults."""

    @asynccontextmanager
    async def open_faulty(spec: WorkerSpec) -> AsyncIterator[Transport]:
        async with open_transport(spec) as transport:
            faulty = FaultyTransport(transport, spec.rank, injector)
            try:
                yield faulty
            finally:
                faulty.note_end()

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
        self._doomed = self._told_end = False
        self._cause = ""

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
        self._cause = self._cause or "was killed by the engine"
        self._inner.kill()

    def send(self, message: ToWorker) -> Coroutine[Any, Any, None]:
        """Send one message, subject to faults."""
        if type(message) is Start:
            self._rank = message.rank  # only now does a standby worker get its rank
        return self._send(message) if self._injector.watching else self._inner.send(message)

    async def receive(self) -> FromWorker:
        """Return the next message, subject to faults."""
        while not self._held:
            message = await self._receive()
            if not self._injector.watching:
                return message
            if type(message) is Ready:
                self._injector.note_start(self._rank.replica, self._rank.rank, self._rank.epoch)
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
        if self._injector.watching and self.alive():
            with trio.move_on_after(stop_budget.FAULT_SHARE * budget):
                await self._misbehave("worker.stop")
        report = await self._inner.stop(max(0.0, began + budget - trio.current_time()))
        if report.outcome == "stopped":
            self._told_end = True
            self._injector.note_stop(self._rank.replica, self._rank.rank, self._rank.epoch)
        else:
            self.note_end(report.outcome)
        return report

    def note_end(self, outcome: str = "killed") -> None:
        """Tell the injector how the worker has ended, unless it was in order: faults may be the reason."""
        if not self._told_end:
            self._told_end = True
            self._injector.note_loss(
                self._rank.replica, self._rank.rank, self._rank.epoch, self._cause or outcome
            )

    async def _receive(self) -> FromWorker:
        try:
            message = await self._inner.receive()
        except WorkerLost as loss:
            self._cause = loss.cause
            raise
        if type(message) is Failed:
            self._cause = f"failed: {message.message}"
        return message

    async def _send(self, message: ToWorker) -> None:
        point = _point(message)
        if point is None or not await self._misbehave(point, message):
            return await self._send_frame(message)
        with suppress(WorkerLost):  # intended by the fault; `receive` reports it
            await self._send_frame(message)

    async def _send_frame(self, message: ToWorker) -> None:
        copies, corrupt = 1, False
        for firing in self._injector.fire(self._site("frame.to_worker", message)):
            match firing.action:
                case "drop":
                    copies = 0
                case "duplicate":
                    copies *= 2
                case "delay":
                    await trio.sleep(firing.fault.duration)
                case "corrupt":
                    corrupt = True
            firing.note(_DONE[firing.action])
        for _ in range(copies):
            await (self._send_garbled(message) if corrupt else self._inner.send(message))

    async def _misbehave(self, point: str, message: ToWorker | None = None) -> bool:
        """Send the worker the faults of a point; return whether there are any.

        A worker that a fault will end hits no further point, because it carries out nothing else.
        """
        firings = [] if self._doomed else self._injector.fire(self._site(point, message))
        self._doomed |= any(firing.fault.fatal for firing in firings)
        with suppress(WorkerLost):
            for firing in firings:
                await self._inner.send(Inject(firing.action, firing.fault.duration))
                if not firing.fault.fatal and firing.record.effect == "":
                    firing.note("the worker was told")
        return bool(firings)

    async def _send_garbled(self, message: ToWorker) -> None:
        if isinstance(self._inner, Pipe):
            return await self._inner.send_bytes(garbled(message))
        # A queue carries values; this is the one that a reader of bytes would have put there.
        await self._inner.send(cast(ToWorker, FrameBroken("a frame that is not msgpack: injected fault")))

    def _hold(self, message: FromWorker, firings: list[Firing]) -> None:
        """Keep a message with faults until it is due, so that a cancelled receiver loses nothing."""
        copies, due = 1, trio.current_time()
        for firing in firings:
            firing.note(_DONE[firing.action])
            match firing.action:
                case "drop":
                    copies = 0
                case "duplicate":
                    copies *= 2
                case "delay":
                    due += firing.fault.duration
                case "corrupt":
                    return self._unread_garbled(message)
        self._held.extend([(due, message)] * copies)

    def _unread_garbled(self, message: FromWorker) -> None:
        if isinstance(self._inner, Pipe):
            return self._inner.unread(garbled(message))
        self._inner.kill()
        raise WorkerLost(self.name, "sent a frame that is not msgpack: injected fault")

    def _site(self, point: str, message: ToWorker | FromWorker | None = None) -> FaultSite:
        kind = type(message).__name__ if message is not None and point.startswith("frame.") else None
        tokens = self._tokens(message) if isinstance(message, Step) else ()
        return FaultSite(point, self._rank.replica, self._rank.rank, self._rank.epoch, kind, tokens)

    def _tokens(self, step: Step) -> tuple[tuple[str, int, int], ...]:
        """Return which tokens of which requests a step is to sample; 0 for the prefill of a prompt."""
        found = []
        for row in step.scheduled:
            if (request := self._injector.find_request(row.seq_id)) is not None:
                last = row.start + row.count - request[1] + 1 if row.sample else 0
                found.append((request[0], last - len(row.draft) if row.sample else 0, last))
        return tuple(found)


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
        case ExportBlocks():
            return "worker.export"
        case ImportBlocks():
            return "worker.import"
    return None
