"""Workers in memory, in trio's own thread and on its clock, under a test's control.

The runner is a real one (usually `ullm.testing.ScriptedRunner`) behind the real worker loop; only time
and death are played. With an autojumping clock a step of ten seconds takes no time::

    workers = FakeWorkers(behaviour=FakeBehaviour(step_seconds=10))
    async with workers.open(WorkerSpec(RankSpec(), "ullm.testing:ScriptedRunner")) as transport:
        ...
        workers.started[-1].die("was killed by SIGKILL")
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from ullm.actors.transports.background import background_tasks
from ullm.actors.transports.base import StopReport, Transport, WorkerSpec
from ullm.errors import WorkerLost
from ullm.protocol.messages import (
    FromWorker,
    Inject,
    Progress,
    Sleep,
    Start,
    Step,
    Stop,
    Stopped,
    ToWorker,
    Wake,
)
from ullm.worker.loop import WorkerLoop, failed, load_runner
from ullm.worker.misbehavior import anywhere, ending

Predicate = Callable[[ToWorker], bool]


def never(message: ToWorker) -> bool:
    """The predicate that picks no message."""
    return False


@dataclass(frozen=True, kw_only=True)
class FakeBehaviour:
    """How a fake worker behaves by itself.

    Args:
        load_seconds: from `Start` to `Ready`.
        step_seconds: from taking up a `Step` to its result.
        stop_seconds: from `Stop` to `Stopped`.
        sleep_seconds: from `Sleep` to `Asleep`.
        wake_seconds: from `Wake` to `Awake`.
        load_error: what loading raises, after ``load_seconds``.
        die_on: messages that it dies of, as if killed by SIGKILL.
        hang_on: messages that it never gets done with, until `FakeWorker.resume`.
    """

    load_seconds: float = 0.0
    step_seconds: float = 0.0
    stop_seconds: float = 0.0
    sleep_seconds: float = 0.0
    wake_seconds: float = 0.0
    load_error: Exception | None = None
    die_on: Predicate = never
    hang_on: Predicate = never

    def seconds(self, message: ToWorker) -> float:
        """How long one message takes."""
        match message:
            case Step():
                return self.step_seconds
            case Start():
                return self.load_seconds
            case Stop():
                return self.stop_seconds
            case Sleep():
                return self.sleep_seconds
            case Wake():
                return self.wake_seconds
        return 0.0


@dataclass
class FakeWorkers:
    """Opens fake workers and remembers them.

    Args:
        behaviour: of each worker; a function of its spec where they differ, by rank or by epoch.
        started: every worker ever opened, in order.
    """

    behaviour: FakeBehaviour | Callable[[WorkerSpec], FakeBehaviour] = field(default_factory=FakeBehaviour)
    started: list[FakeWorker] = field(default_factory=list)

    @asynccontextmanager
    async def open(self, spec: WorkerSpec) -> AsyncIterator[Transport]:
        """An `OpenTransport`."""
        behaviour = self.behaviour if isinstance(self.behaviour, FakeBehaviour) else self.behaviour(spec)
        worker = FakeWorker(spec, behaviour)
        self.started.append(worker)
        async with background_tasks() as nursery:
            nursery.start_soon(worker.run)
            try:
                yield worker
            finally:
                worker.kill()


class FakeWorker:
    """See `Transport`; `die`, `hang`, `resume` and `emit` are for the test.

    Attributes:
        received: every message that reached the worker.
        sent: every message that it sent.
    """

    def __init__(self, spec: WorkerSpec, behaviour: FakeBehaviour) -> None:
        self.spec = spec
        self.name = spec.rank.name
        self.received: list[ToWorker] = []
        self.sent: list[FromWorker] = []
        self._behaviour = behaviour
        self._inbox, self._messages = trio.open_memory_channel[ToWorker](math.inf)
        self._deliver, self._delivered = trio.open_memory_channel[FromWorker](math.inf)
        self._may_go_on = trio.Event()
        self._may_go_on.set()
        self._loaded = self._suspended = False
        self._life = trio.CancelScope()
        self._ended = trio.Event()
        self._cause = "exited with status 0"

    @property
    def pid(self) -> None:
        """It is no process."""
        return None

    # --- the transport ---

    def alive(self) -> bool:
        """Whether it has not ended or died."""
        return not self._ended.is_set() and not self._life.cancel_called

    def suspended(self) -> bool:
        """Whether it plays being stopped by SIGSTOP, as a fault plan may ask; `hang` is another thing."""
        return self._suspended

    async def send(self, message: ToWorker) -> None:
        """Hand one message over."""
        await trio.lowlevel.checkpoint()
        if not self.alive():
            raise WorkerLost(self.name, self._cause)
        self._inbox.send_nowait(message)

    async def receive(self) -> FromWorker:
        """The next message; those sent before the end come first."""
        try:
            return await self._delivered.receive()
        except trio.EndOfChannel:
            raise WorkerLost(self.name, self._cause) from None

    def kill(self) -> None:
        """As the transport's user."""
        self.die("was killed by SIGKILL")

    async def stop(self, budget: float) -> StopReport:
        """`Stop`, then force."""
        began = trio.current_time()
        was_alive = self.alive()
        if was_alive:
            self._inbox.send_nowait(Stop(budget))
            with trio.move_on_after(budget):
                await self._ended.wait()
            self.kill()
        said = [message for message in self.sent if isinstance(message, Stopped)]
        outcome = "stopped" if said else "killed" if was_alive else "lost"
        timings = said[0].timings if said else {}
        return StopReport(self.name, outcome, trio.current_time() - began, timings)

    # --- the test's hands ---

    def die(self, cause: str) -> None:
        """End at once, whatever it was doing; ``cause`` reads like an exit status or a signal."""
        if self.alive():
            self._cause = cause
            self._life.cancel()
            self._deliver.close()

    def hang(self) -> None:
        """Answer nothing from now on: what it is doing does not get done."""
        if self._may_go_on.is_set():
            self._may_go_on = trio.Event()

    def resume(self) -> None:
        """Go on after a hang: all that was left undone is done, late."""
        self._may_go_on.set()

    def emit(self, message: FromWorker) -> None:
        """Have the worker say something it would not say by itself: a duplicate, a stranger's result."""
        self.sent.append(message)
        if not self._life.cancel_called:
            self._deliver.send_nowait(message)

    # --- the worker ---

    async def run(self) -> None:
        """Task: serve until it is stopped, fails, or dies."""
        with self._life:
            try:
                await self._serve()
            except Exception as error:
                self._cause = "exited with status 1"
                self.emit(failed(error))
        self._ended.set()
        self._deliver.close()

    async def _serve(self) -> None:
        self.emit(Progress("import"))
        loop = WorkerLoop(load_runner(self.spec.runner), self.emit)
        while not loop.stopped:
            message = await self._messages.receive()
            self.received.append(message)
            if isinstance(message, Inject):
                await self._misbehave(message)
                continue
            self._loaded |= isinstance(message, Start)
            await self._spend_time(message)
            if isinstance(message, Start) and self._behaviour.load_error is not None:
                raise self._behaviour.load_error
            loop.handle(message)
            while loop.pending:
                loop.send_oldest()

    async def _misbehave(self, inject: Inject) -> None:
        """What a process would do, in virtual time."""
        match inject.action:
            case "crash" | "exit":
                self.die(ending(inject.action))
                await trio.lowlevel.checkpoint()
            case "slow":
                await trio.sleep(inject.seconds)
            case "hang" | "stop":
                self._suspended = inject.action == "stop"
                self.hang()
                with trio.move_on_after(inject.seconds or math.inf):
                    await self._may_go_on.wait()
                self.resume()
                self._suspended = False
            case _:
                anywhere(inject, self._loaded)

    async def _spend_time(self, message: ToWorker) -> None:
        if self._behaviour.die_on(message):
            self.kill()
        if self._behaviour.hang_on(message):
            self.hang()
        await trio.sleep(self._behaviour.seconds(message))
        await self._may_go_on.wait()
