"""A worker on another host, seen from the engine: frames through the agent there."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import msgspec
import trio

from ullm.actors.transports.base import StopReport, WorkerSpec
from ullm.errors import FrameBroken, WorkerLost
from ullm.protocol import stop_budget
from ullm.protocol.frames import FrameReader, encode
from ullm.protocol.messages import FromWorker, Prepare, Start, ToWorker
from ullm.protocol.node_messages import KillWorker, StopWorker, ToNodeWorker, WorkerStopped

Adapt = Callable[["RemoteWorker", Start | Prepare], Awaitable[Start | Prepare]]


class RemoteWorker:
    """See `Transport`.

    Args:
        number: the worker's number on its link.
        send: queues a message on the link.
        adapt: returns a start with what is different on that host: the model's path, where ranks meet.
        host: the host's name, for errors.
    """

    def __init__(
        self, number: int, spec: WorkerSpec, send: Callable[[msgspec.Struct], None], adapt: Adapt, host: str
    ) -> None:
        self.number, self.spec = number, spec
        self.name = spec.rank.name
        """As in logs."""
        self.host = host
        self.is_suspended = False
        self.opened = trio.Event()
        self.tunnel = trio.Event()
        self.tunnel_port = 0
        self.rendezvous_port = 0
        self._post = send
        self._adapt = adapt
        self._reader: FrameReader[FromWorker] = FrameReader(FromWorker)
        self._deliver, self._delivered = trio.open_memory_channel[bytes](math.inf)
        self._loss: WorkerLost | None = None
        self._stopped = trio.Event()
        self._report: StopReport | None = None

    # --- as a transport ------------------------------------------------------------------------------------

    @property
    def pid(self) -> None:
        """The process is on another host."""
        return None

    def alive(self) -> bool:
        """Whether the worker runs, as far as its agent has said."""
        return self._loss is None

    def suspended(self) -> bool:
        """Whether a signal has stopped the process, as its agent said with its last sign of life."""
        return self.is_suspended

    async def send(self, message: ToWorker) -> None:
        """Send one message; a start is adapted to the host first."""
        if isinstance(message, Start | Prepare):
            message = await self._adapt(self, message)
        await self.send_bytes(encode(message))

    async def send_bytes(self, frame: bytes) -> None:
        """Send bytes that need not be a valid frame: see `ullm.actors.transports.faulty`."""
        await trio.lowlevel.checkpoint()
        if self._loss is not None:
            raise self._loss
        self._post(ToNodeWorker(self.number, frame))

    async def receive(self) -> FromWorker:
        """Return the next message; those sent before the worker's end come first."""
        while True:
            try:
                message = self._reader.next()
            except FrameBroken as error:
                self.kill()
                self.lost(f"sent {error}")
                raise self._lost() from None
            if message is not None:
                return message
            try:
                self._reader.feed(await self._delivered.receive())
            except trio.EndOfChannel:
                raise self._lost() from None

    def unread(self, data: bytes) -> None:
        """Put bytes in front of those still to be read, as if the worker had sent them."""
        self._reader.unread(data)

    def kill(self) -> None:
        """Have the agent kill the worker."""
        if self.alive():
            self._post(KillWorker(self.number))

    async def stop(self, budget: float) -> StopReport:
        """Have the agent stop the worker; see `Transport.stop`. Without an answer it counts as lost."""
        began = trio.current_time()
        if self.alive():
            self._post(StopWorker(self.number, stop_budget.REMOTE_SHARE * budget))
            with trio.move_on_after(budget):
                await self._stopped.wait()
        seconds = trio.current_time() - began
        if self._report is None:
            return StopReport(self.name, "lost", seconds, {})
        return StopReport(self.name, self._report.outcome, seconds, self._report.timings)

    # --- for the link --------------------------------------------------------------------------------------

    def take_frame(self, frame: bytes) -> None:
        """Take a frame of the worker's."""
        if self._loss is None:
            self._deliver.send_nowait(frame)

    def take_report(self, message: WorkerStopped) -> None:
        """Take how its stop went."""
        self._report = StopReport(self.name, message.outcome, message.seconds, message.timings)
        self._stopped.set()

    def lost(self, cause: str, stderr_tail: tuple[str, ...] = ()) -> None:
        """Note that the worker is gone, or cannot be reached."""
        if self._loss is None:
            self._loss = WorkerLost(self.name, cause, stderr_tail)
            self._deliver.close()
            for event in (self.opened, self.tunnel):
                event.set()

    def link_lost(self, cause: str) -> None:
        """Note that its host cannot be reached; no report will come."""
        self.lost(cause)
        self._stopped.set()

    def check(self) -> None:
        """Raise `WorkerLost` if the worker is lost."""
        if self._loss is not None:
            raise self._lost()

    def _lost(self) -> WorkerLost:
        assert self._loss is not None, "the channel is closed with the loss"
        return WorkerLost(self._loss.name, self._loss.cause, self._loss.stderr_tail)
