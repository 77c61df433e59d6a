"""In-memory workers under a test's control, in trio's own thread and on its clock.

The runner is a real one (usually `ullm.testing.ScriptedRunner`) behind the real worker loop; only durations
and deaths are simulated. With an autojumping clock a step of ten seconds takes no time::

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
    """Match no message."""
    return False


@dataclass(frozen=True, kw_only=True)
class FakeBehaviour:
    """How a fake worker behaves without further instructions.

    Args:
        load_seconds: time from `Start` to `Ready`.
        step_seconds: time from the begin of a `Step` to its result.
        stop_seconds: time from `Stop` to `Stopped`.
        sleep_seconds: time from `Sleep` to `Asleep`.
        wake_seconds: time from `Wake` to `Awake`.
        load_error: exception that loading raises, after ``load_seconds``.
        die_on: matches messages that kill it, as if by SIGKILL.
        hang_on: matches messages that make it hang until `FakeWorker.resume`.
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
        """Return how long one message takes."""
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
    """Starts fake workers and remembers them.

    Args:
        behaviour: the behaviour of each worker, or a function of its spec where ranks or epochs differ.
        started: every worker ever opened, in order.
    """

    behaviour: FakeBehaviour | Callable[[WorkerSpec], FakeBehaviour] = field(default_factory=FakeBehaviour)
    started: list[FakeWorker] = field(default_factory=list)

    @asynccontextmanager
    async def open(self, spec: WorkerSpec) -> AsyncIterator[Transport]:
        """Start one worker; an `OpenTransport`."""
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
    """See `Transport`; tests call `die`, `hang`, `resume` and `emit`.

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
        self._resumed = trio.Event()
        self._resumed.set()
        self._loaded = self._suspended = False
        self._life = trio.CancelScope()
        self._ended = trio.Event()
        self._cause = "exited with status 0"

    @property
    def pid(self) -> None:
        """Return None: it is not a process."""
        return None

    # --- the transport ---

    def alive(self) -> bool:
        """Whether it has neither ended nor died."""
        return not self._ended.is_set() and not self._life.cancel_called

    def suspended(self) -> bool:
        """Whether it simulates a stop by SIGSTOP, as a fault plan may ask for; `hang` does not count."""
        return self._suspended

    async def send(self, message: ToWorker) -> None:
        """Hand one message over."""
        await trio.lowlevel.checkpoint()
        if not self.alive():
            raise WorkerLost(self.name, self._cause)
        self._inbox.send_nowait(message)

    async def receive(self) -> FromWorker:
        """Return the next message; those sent before the end come first."""
        try:
            return await self._delivered.receive()
        except trio.EndOfChannel:
            raise WorkerLost(self.name, self._cause) from None

    def kill(self) -> None:
        """Die as if by SIGKILL."""
        self.die("was killed by SIGKILL")

    async def stop(self, budget: float) -> StopReport:
        """Send `Stop`, and kill the worker after ``budget`` seconds."""
        began = trio.current_time()
        was_alive = self.alive()
        if was_alive:
            self._inbox.send_nowait(Stop(budget))
            with trio.move_on_after(budget):
                await self._ended.wait()
            self.kill()
        stopped = [message for message in self.sent if isinstance(message, Stopped)]
        outcome = "stopped" if stopped else "killed" if was_alive else "lost"
        timings = stopped[0].timings if stopped else {}
        return StopReport(self.name, outcome, trio.current_time() - began, timings)

    # --- for tests ---

    def die(self, cause: str) -> None:
        """End at once, whatever it was doing; ``cause`` describes it like an exit status or a signal."""
        if self.alive():
            self._cause = cause
            self._life.cancel()
            self._deliver.close()

    def hang(self) -> None:
        """Answer nothing until `resume`, not even the current message."""
        if self._resumed.is_set():
            self._resumed = trio.Event()

    def resume(self) -> None:
        """Continue after a hang, with everything that has arrived meanwhile."""
        self._resumed.set()

    def emit(self, message: FromWorker) -> None:
        """Send a message that the worker would not send by itself, such as a duplicate.

        Nothing arrives from a worker that has ended.
        """
        self.sent.append(message)
        if self.alive():
            self._deliver.send_nowait(message)

    # --- the worker ---

    async def run(self) -> None:
        """Serve until it is stopped, fails, or dies; a task of the transport."""
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
        """Carry out a fault as a process would, in virtual time."""
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
                    await self._resumed.wait()
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
        await self._resumed.wait()
