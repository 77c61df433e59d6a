"""The worker group: the ranks of one replica, which live and die together.

The ranks must start at the same time, because they meet in a rendezvous, and none is of use without
the others. So they are tasks of one nursery: the first one to be lost ends them all, and the group's
supervisor starts a new incarnation, with a higher number.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

import trio

from ullm.actors.step_watchdog import LATE_SECONDS, LOOK_SECONDS, SUSPENDED_SECONDS, StepWatchdog
from ullm.actors.transports.base import OpenTransport, StopReport, Transport, WorkerSpec
from ullm.actors.worker_failure import checked
from ullm.config import EngineConfig
from ullm.errors import WorkerLost, first_cause
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.protocol.messages import (
    Asleep,
    Awake,
    FromWorker,
    ModelInfo,
    Ping,
    Pong,
    Progress,
    RankSpec,
    Ready,
    Sleep,
    Start,
    Step,
    StepResult,
    ToWorker,
    Wake,
)
from ullm.supervision.actor import cleanup_scope

log = get_logger("ullm.group")


class WorkerGroup:
    """Starts the ranks of one replica, feeds them steps, and notices when one dies or hangs.

    Args:
        replica: index of the replica.
        slot: its place in the engine: which devices and ports are its own.
        config: how many ranks, and how long they may take.
        open_transport: how to start one.
    """

    def __init__(self, replica: int, slot: int, config: EngineConfig, open_transport: OpenTransport) -> None:
        self.replica = replica
        self.slot = slot
        self.incarnation = 0
        self.model_path = ""
        self.info: ModelInfo | None = None
        self.stop_reports: list[StopReport] = []
        self._starts = 0
        self._requested_starts = 1
        self._config = config
        self._open_transport = open_transport
        self._transports: list[Transport] = []
        self._watchdogs: list[StepWatchdog] = []
        self._known: set[int] = set()
        self._starting: dict[str, Progress] = {}
        self._last_step = self._last_ping = 0
        self._ready = False
        self._answers: dict[int, Asleep | Awake] = {}
        self._answered = trio.Event()
        self._round_trip: tuple[float, float] | None = None
        self._deliver: Callable[[StepResult], None] | None = None

    # --- for the scheduler -------------------------------------------------------------------------

    async def send(self, step: Step) -> None:
        """Send a step to every rank; its result goes to the attached scheduler."""
        self._last_step = step.step_id
        self._known.difference_update(step.released)
        self._known.update(new.seq_id for new in step.new_sequences)
        await self._send(step, ("step", step.step_id))

    async def sleep(self, level: int) -> int:
        """Have every rank give memory back; no step may be in flight.

        Returns:
            Bytes given back, by all ranks together.
        """
        answers = await self._ask_all(Sleep(level), "sleep")
        return sum(sum(a.given_back.values()) for a in answers if isinstance(a, Asleep))

    async def wake(self) -> ModelInfo:
        """Have every rank be as after its start, with all sequences forgotten."""
        answers = await self._ask_all(Wake(), "wake")
        self._known.clear()
        self.info = next(answer.info for answer in answers if isinstance(answer, Awake))
        return self.info

    async def _ask_all(self, message: Sleep | Wake, name: str) -> list[Asleep | Awake]:
        """Every rank's answer. Should one be lost, this ends with the group, by cancellation."""
        self._answers.clear()
        await self._send(message, name)
        while len(self._answers) < len(self._transports):
            self._answered = trio.Event()
            await self._answered.wait()
        return list(self._answers.values())

    async def _send(self, message: ToWorker, owed: object) -> None:
        for transport, watchdog in zip(self._transports, self._watchdogs, strict=True):
            watchdog.owe(owed)
            try:
                await transport.send(message)
            except WorkerLost:
                # The group's own task sees the same loss and ends with it; failing here as well would
                # count one loss twice.
                await trio.sleep_forever()

    async def attach(self, deliver: Callable[[StepResult], None]) -> int:
        """Send results to ``deliver`` from now on, with every sequence forgotten.

        A scheduler that was restarted begins with empty hands: what the workers still compute for
        the one before it is dropped.

        Returns:
            The number of the last step sent; the scheduler counts on from there.
        """
        barrier = self._last_step + 1

        def drop_until_barrier(result: StepResult) -> None:
            if result.step_id == barrier:
                self._deliver = deliver

        self._deliver = drop_until_barrier
        await self.send(Step(step_id=barrier, scheduled=[], released=sorted(self._known)))
        return barrier

    def detach(self) -> None:
        """Drop results until a scheduler attaches again."""
        self._deliver = None

    # --- for the fleet -----------------------------------------------------------------------------

    @property
    def restarts(self) -> int:
        """Starts after a loss; those that were requested do not count."""
        return max(0, self._starts - self._requested_starts)

    def expect_start(self) -> None:
        """Note that the next start is requested: it follows a stop, not a loss."""
        self._requested_starts += 1

    def load_from(self, model_path: str) -> None:
        """Have the ranks load the model from there when they are started the next time."""
        self.model_path = model_path

    def continue_after(self, other: WorkerGroup) -> None:
        """Count incarnations on from those of another group in the same slot.

        Ports of the rendezvous are counted with them: a rank must not meet what is left of an earlier one.
        """
        self.incarnation = max(self.incarnation, other.incarnation)

    def kill(self) -> None:
        """End every rank now."""
        for transport in self._transports:
            transport.kill()

    @property
    def alive(self) -> bool:
        """Whether the group is whole."""
        return bool(self._transports) and all(transport.alive() for transport in self._transports)

    def round_trip(self) -> tuple[float, float] | None:
        """Seconds since an answer last came through the step loop, and how long it took; None before."""
        if self._round_trip is None:
            return None
        at, seconds = self._round_trip
        return trio.current_time() - at, seconds

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks that are processes."""
        return [transport.pid for transport in self._transports if transport.pid is not None]

    # --- the supervised child ------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[ModelInfo]) -> None:
        """Start the ranks, be ready when all are, and run until one is lost.

        Raises:
            ModelError: the model cannot be loaded; trying again would not help.
            WorkerLost: a rank died, hung, or failed.
        """
        self.incarnation += 1
        self._starts += 1
        self._known.clear()
        self._ready = False
        self._starting.clear()
        self._round_trip = None
        async with AsyncExitStack() as stack:
            self._transports = [
                await stack.enter_async_context(self._open_transport(self._spec(rank)))
                for rank in range(self._config.world_size)
            ]
            try:
                await self._start_and_watch(task_status)
            except WorkerLost:
                # Whoever is left waits for the lost one, or hangs: there is no use in asking.
                self.kill()
                raise
            finally:
                await self._stop_ranks()

    async def _start_and_watch(self, task_status: trio.TaskStatus[ModelInfo]) -> None:
        infos: list[ModelInfo] = []
        self._watchdogs = [StepWatchdog(self._config.step_timeout) for _ in self._transports]
        try:
            async with trio.open_nursery() as starting:
                for rank in range(len(self._transports)):
                    starting.start_soon(self._start_watched, rank, infos)
            self.info = infos[0]
            async with trio.open_nursery() as watching:
                for rank in range(len(self._transports)):
                    watching.start_soon(self._watch_rank, rank)
                    watching.start_soon(self._look_at_rank, rank)
                watching.start_soon(self._send_canaries)
                self._ready = True
                task_status.started(infos[0])
        except BaseExceptionGroup as group:
            raise first_cause(group) from group

    async def _start_watched(self, rank: int, infos: list[ModelInfo]) -> None:
        self._watchdogs[rank].owe("ready")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_at_rank, rank)
            await self._start_rank(rank, infos)
            nursery.cancel_scope.cancel()
        self._watchdogs[rank].settle("ready")

    async def _start_rank(self, rank: int, infos: list[ModelInfo]) -> None:
        transport, patience = self._transports[rank], self._config.start_timeout
        with trio.move_on_after(patience):
            await transport.send(Start(self._config, self._spec(rank).rank, self.model_path))
            while not isinstance(message := await self._sign_of_life(transport), Ready):
                log.debug("worker starting", worker=transport.name, said=message)
            log.info("worker ready", worker=transport.name, incarnation=self.incarnation, **message.timings)
            infos.append(message.info)
            return
        raise WorkerLost(transport.name, f"was not ready within --start-timeout {patience:g} s")

    async def _sign_of_life(self, transport: Transport) -> FromWorker:
        """The next message of a worker that starts; what takes long is announced by `Progress`."""
        last = self._starting.get(transport.name, Progress("start", self._config.start_timeout))
        with trio.move_on_after(last.budget):
            message = checked(transport, await transport.receive())
            if isinstance(message, Progress):
                self._starting[transport.name] = message
            return message
        raise WorkerLost(
            transport.name, f"gave no sign of life for {last.budget:g} s at stage {last.stage!r}"
        )

    async def _watch_rank(self, rank: int) -> None:
        transport, watchdog = self._transports[rank], self._watchdogs[rank]
        while True:
            with watchdog.renewed():
                while True:
                    self._take(rank, checked(transport, await transport.receive()))
            # If this process itself was suspended, the answer has been there for long.
            with trio.move_on_after(LATE_SECONDS) as late:
                self._take(rank, checked(transport, await transport.receive()))
            if late.cancelled_caught:
                break
        raise WorkerLost(transport.name, f"made no progress for {self._config.step_timeout:g} s")

    async def _look_at_rank(self, rank: int) -> None:
        """A worker that is suspended is as good as hung, and is known to be so much sooner."""
        transport, watchdog, since = self._transports[rank], self._watchdogs[rank], float("inf")
        while True:
            await trio.sleep(LOOK_SECONDS)
            suspended = not watchdog.is_idle and transport.suspended()
            since = min(since, trio.current_time()) if suspended else float("inf")
            if trio.current_time() - since >= SUSPENDED_SECONDS:
                raise WorkerLost(transport.name, f"was suspended for {SUSPENDED_SECONDS:g} s (SIGSTOP)")

    async def _send_canaries(self) -> None:
        """Idle workers are asked for an answer through their step loop, as busy ones give by themselves."""
        while True:
            await trio.sleep(self._config.health_interval)
            if all(watchdog.is_idle for watchdog in self._watchdogs):
                self._last_ping += 1
                await self._send(Ping(self._last_ping), ("ping", self._last_ping))

    def _take(self, rank: int, message: FromWorker) -> None:
        watchdog = self._watchdogs[rank]
        match message:
            case Progress():
                watchdog.extend(message.budget)
            case StepResult():
                if (missing := watchdog.skipped(message.step_id)) is not None:  # tokens would be missing
                    name = self._transports[rank].name
                    raise WorkerLost(
                        name, f"sent the result of step {message.step_id} and none of step {missing}"
                    )
                if self._settle(rank, ("step", message.step_id)) and rank == 0 and self._deliver is not None:
                    self._deliver(message)
            case Pong():
                self._settle(rank, ("ping", message.number))
            case Asleep() | Awake():
                if self._settle(rank, "sleep" if isinstance(message, Asleep) else "wake"):
                    self._answers[rank] = message
                    self._answered.set()

    def _settle(self, rank: int, owed: object) -> bool:
        """Whether this answer was owed; a doubled one is not."""
        asked = self._watchdogs[rank].settle(owed)
        if asked is not None:
            self._round_trip = trio.current_time(), trio.current_time() - asked
        return asked is not None

    async def _stop_ranks(self) -> None:
        with cleanup_scope() as scope:
            budget = stop_budget.RANK_SHARE * max(0.0, scope.deadline - trio.current_time())
            if not self._ready:  # nothing to finish
                budget = min(budget, stop_budget.STARTING_WORKER)
            reports: list[StopReport] = []
            async with trio.open_nursery() as nursery:
                for transport in self._transports:
                    nursery.start_soon(_stop_rank, transport, budget, reports)
            # A thread that was given up in an earlier incarnation is here still.
            self.stop_reports = [r for r in self.stop_reports if r.outcome == "abandoned"] + reports
        self._transports = []

    def _spec(self, rank: int) -> WorkerSpec:
        config = self._config
        first = self.slot * config.world_size
        devices = config.device_ids or tuple(range(config.world_size * config.replicas))
        rank_spec = RankSpec(
            replica=self.replica,
            rank=rank,
            world_size=config.world_size,
            epoch=self.incarnation,
            # A port of its own for each incarnation: a rank must not meet what is left of the last one.
            rendezvous=f"127.0.0.1:{config.nccl_port + self.slot + config.replicas * (self.incarnation - 1)}",
            device_index=None if config.device == "cpu" else devices[first + rank],
        )
        return WorkerSpec(rank_spec, config.runner, config.cpu_threads)


async def _stop_rank(transport: Transport, budget: float, reports: list[StopReport]) -> None:
    report = await transport.stop(budget)
    reports.append(report)
    log.debug("worker ended", worker=report.name, outcome=report.outcome, seconds=round(report.seconds, 3))
