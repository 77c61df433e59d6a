"""The worker group: the ranks of one replica, which live and die together.

The ranks must start at the same time, because they meet in a rendezvous, and none is of use without the
others. So they are tasks of one nursery: the first one to be lost ends them all, and the group's supervisor
starts a new incarnation, with a higher number.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import trio
from msgspec import structs

from ullm.actors.block_transfer import AnyTransfer
from ullm.actors.step_agreement import StepAgreement
from ullm.actors.transports.base import OpenTransport, StopReport, Transport, WorkerSpec
from ullm.actors.worker_rank import NOTICE_SECONDS, WorkerRank
from ullm.config import EngineConfig, Tuning
from ullm.errors import WorkerFailed, WorkerLost, first_cause
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.protocol.messages import (
    Adapter,
    AdapterKept,
    Asleep,
    Awake,
    BlocksExported,
    BlocksImported,
    FromWorker,
    KeepAdapter,
    ModelInfo,
    Ping,
    Pong,
    Progress,
    RankSpec,
    Sleep,
    Start,
    Step,
    StepResult,
    ToWorker,
    Wake,
)
from ullm.scheduling import placement
from ullm.supervision.actor import cleanup_scope
from ullm.supervision.policy import exponential_backoff

log = get_logger(__name__)


BACKOFF_SECONDS, BACKOFF_LIMIT = 1.0, 10.0
"""Delay of a start after one that failed: doubled with each in a row, up to the limit. The first start after
a loss comes at once."""

CAUSE_SECONDS = 0.2
"""Time in which a rank's death is noticed after others have failed because of it."""

RENDEZVOUS_ROUNDS = 16
"""Incarnations of a group after which its rendezvous port is used again."""


class Meeting:
    """Where the ranks of one incarnation meet.

    Args:
        address: where rank 0 is to listen; replaced by where it does.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.known = trio.Event()

    def learn(self, progress: Progress) -> None:
        """Take the address from what rank 0 announces."""
        if progress.rendezvous:
            self.address = progress.rendezvous
            self.known.set()


class WorkerGroup:
    """Starts the ranks of one replica, feeds them steps, and notices when one dies or hangs.

    It has more than 20 methods because scheduler, fleet and supervisor each have their own interface to it.

    Args:
        replica: index of the replica.
        slot: its place in the engine, which determines its devices and ports.
        config: number of ranks, and their timeouts.
        open_transport: starts one rank.
    """

    def __init__(self, replica: int, slot: int, config: EngineConfig, open_transport: OpenTransport) -> None:
        self.replica = replica
        self.slot = slot
        self.incarnation = 0
        self.model_path = self.tokenizer_path = ""
        self.tuning = Tuning()
        self.info: ModelInfo | None = None
        self.stop_reports: list[StopReport] = []
        self._starts = self._failed_starts = 0
        self._requested_starts = 1
        self._config = config
        self._open_transport = open_transport
        self._ranks: list[WorkerRank] = []
        self._known: set[int] = set()
        self._last_step = self._last_ping = 0
        self._ready = False
        self._answers: dict[int, Asleep | Awake] = {}
        self._answered = trio.Event()
        self._kept: dict[int, AdapterKept] = {}
        self._transfers: dict[int, AnyTransfer] = {}
        self._lost = trio.Event()
        self._round_trip: tuple[float, float] | None = None
        self._deliver: Callable[[StepResult], None] | None = None
        self._agreement = StepAgreement((), 0)

    # --- for the scheduler -------------------------------------------------------------------------

    async def send(self, step: Step) -> None:
        """Send a step to every rank; its result goes to the attached scheduler."""
        self._last_step = step.step_id
        self._known.difference_update(step.released)
        self._known.update(new.seq_id for new in step.new_sequences)
        await self._send(step, ("step", step.step_id))

    async def send_blocks(self, transfer: AnyTransfer) -> None:
        """Send each rank its message of a transfer, which gets the answers."""
        transfer.sent = True
        self._transfers[transfer.number] = transfer
        await self._send(transfer.messages, ("blocks", transfer.number))

    async def sleep(self, level: int) -> int:
        """Have every rank free memory; no step may be in flight.

        Returns:
            Bytes freed by all ranks together.
        """
        answers = await self._ask_all(Sleep(level), "sleep")
        return sum(sum(a.given_back.values()) for a in answers if isinstance(a, Asleep))

    async def wake(self) -> ModelInfo:
        """Have every rank return to its state after the start, without sequences; return its model info."""
        answers = await self._ask_all(Wake(), "wake")
        self._known.clear()
        self.info = next(answer.info for answer in answers if isinstance(answer, Awake))
        return self.info

    async def _ask_all(self, message: Sleep | Wake, name: str) -> list[Asleep | Awake]:
        """Return every rank's answer. The loss of a rank cancels this together with the group."""
        self._answers.clear()
        await self._send(message, name)
        while len(self._answers) < len(self._ranks):
            self._answered = trio.Event()
            await self._answered.wait()
        return list(self._answers.values())

    async def _send(self, message: ToWorker | Sequence[ToWorker], owed: object) -> None:
        """Send to all ranks at the same time: none waits until the pipe of another one has room.

        Args:
            message: the same for all, or one for each.

        Wait to be cancelled if they are gone, as `WorkerRank.send` does.

        Raises:
            WorkerLost: they are gone, and this task was not cancelled in time.
        """
        if not self._ranks:
            await trio.sleep(NOTICE_SECONDS)
            raise WorkerLost(f"replica{self.replica}", "has no workers")
        messages = message if isinstance(message, Sequence) else [message] * len(self._ranks)
        if len(self._ranks) == 1:
            return await self._ranks[0].send(messages[0], owed)
        try:
            async with trio.open_nursery() as nursery:
                for rank, each in zip(self._ranks, messages, strict=True):
                    nursery.start_soon(rank.send, each, owed)
        except BaseExceptionGroup as group:
            raise first_cause(group) from group

    async def attach(self, deliver: Callable[[StepResult], None]) -> int:
        """Release every sequence, and send the results of later steps to ``deliver``.

        A restarted scheduler begins empty: results that the workers still compute for the former one are
        dropped.

        Returns:
            The number of the last step sent; the scheduler continues from there.
        """
        barrier = self._last_step + 1

        def drop_until_barrier(result: StepResult) -> None:
            if result.step_id == barrier:
                self._deliver = deliver

        self._deliver = drop_until_barrier
        await self.send(Step(step_id=barrier, scheduled=[], released=sorted(self._known)))
        return barrier

    def detach(self) -> None:
        """Drop results until a scheduler attaches."""
        self._deliver = None

    # --- for the fleet -----------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether every rank is up, as far as is known."""
        return self._ready

    async def keep_adapter(self, adapter: Adapter, *, wanted: bool) -> str:
        """Have every rank load an adapter, or drop it; return why one cannot load it, or an empty text.

        One caller at a time; the group is ready, and may be in the midst of steps.

        Raises:
            WorkerLost: a rank was lost meanwhile.
        """
        lost = self._lost
        self._kept.clear()

        async def cancel_when_lost(scope: trio.CancelScope) -> None:
            await lost.wait()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_when_lost, nursery.cancel_scope)
            await self._send(KeepAdapter(adapter, wanted), ("adapter", adapter.number))
            while len(self._kept) < len(self._ranks):
                self._answered = trio.Event()
                await self._answered.wait()
            nursery.cancel_scope.cancel()
        if lost.is_set():
            raise WorkerLost(f"replica{self.replica}", f"was lost with the adapter {adapter.name!r}")
        return next((kept.error for kept in self._kept.values() if kept.error), "")

    @property
    def restarts(self) -> int:
        """Starts after a loss; those that were requested do not count."""
        return max(0, self._starts - self._requested_starts)

    def expect_start(self) -> None:
        """Note that the next start is requested: it follows a stop, not a loss."""
        self._requested_starts += 1
        self._failed_starts = 0

    def load_from(self, model_path: str, tuning: Tuning, tokenizer_path: str = "") -> None:
        """Have the ranks load the model from there, so tuned, when they are started the next time."""
        self.model_path, self.tuning, self.tokenizer_path = model_path, tuning, tokenizer_path

    def continue_after(self, other: WorkerGroup) -> None:
        """Count incarnations on from those of another group in the same slot; see `rendezvous_port`."""
        self.incarnation = max(self.incarnation, other.incarnation)

    def kill(self) -> None:
        """Kill every rank now."""
        for rank in self._ranks:
            rank.transport.kill()

    @property
    def alive(self) -> bool:
        """Whether every rank runs."""
        return bool(self._ranks) and all(rank.transport.alive() for rank in self._ranks)

    def round_trip(self) -> tuple[float, float] | None:
        """Return the seconds since the last answer through the step loop, and the seconds that it took.

        None before the first answer.
        """
        if self._round_trip is None:
            return None
        at, seconds = self._round_trip
        return trio.current_time() - at, seconds

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks that are processes."""
        return [rank.transport.pid for rank in self._ranks if rank.transport.pid is not None]

    # --- the supervised child ------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[ModelInfo]) -> None:
        """Start the ranks, report ready when all of them are, and run until one is lost.

        Raises:
            ModelError, ConfigError: the model cannot be loaded; trying again would not help.
            WorkerLost: a rank died, hung, or failed.
        """
        self.incarnation += 1
        self._starts += 1
        self._known.clear()
        self._transfers.clear()
        self._ready = False
        self._lost = trio.Event()
        self._round_trip = None
        if self._failed_starts:
            await trio.sleep(exponential_backoff(BACKOFF_SECONDS, BACKOFF_LIMIT)(self._failed_starts))
        self._failed_starts += 1
        async with AsyncExitStack() as stack:
            self._ranks = [
                WorkerRank(transport, self._config.step_timeout)
                for rank in range(self._config.world_size)
                for transport in [await stack.enter_async_context(self._open_transport(self._spec(rank)))]
            ]
            names = [rank.transport.name for rank in self._ranks]
            self._agreement = StepAgreement(names, self._config.lead_rank)
            try:
                await self._start_and_watch(task_status)
            except WorkerLost:
                # The other ranks wait for the lost one, or hang: asking them to stop is of no use.
                self.kill()
                raise
            finally:
                self._lost.set()
                await self._stop_ranks()
                self._ready = False

    async def _start_and_watch(self, task_status: trio.TaskStatus[ModelInfo]) -> None:
        infos: dict[int, ModelInfo] = {}
        try:
            async with trio.open_nursery() as starting:
                meeting = Meeting(self._spec(0).rank.rendezvous)
                for index in range(len(self._ranks)):
                    start = partial(self._start_rank, index, meeting, infos)
                    starting.start_soon(self._unless_another_is_lost, start)
            self.info = infos[0]
            async with trio.open_nursery() as watching:
                for index, rank in enumerate(self._ranks):
                    watching.start_soon(self._unless_another_is_lost, rank.watch, partial(self._take, index))
                    watching.start_soon(rank.watch_suspension)
                watching.start_soon(self._send_canaries)
                self._ready, self._failed_starts = True, 0
                task_status.started(infos[0])
        except BaseExceptionGroup as group:
            raise first_cause(group) from group

    async def _unless_another_is_lost(self, watch: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Watch a rank. One that fails may do so because another is lost: the cause to name."""
        try:
            await watch(*arguments)
        except WorkerFailed:
            if len(self._ranks) > 1:
                await trio.sleep(CAUSE_SECONDS)  # cancelled by the other loss
            raise

    async def _start_rank(self, index: int, meeting: Meeting, infos: dict[int, ModelInfo]) -> None:
        """Start one rank; all but rank 0 wait until that one has said where it listens for them."""
        rank, config = self._ranks[index], self._config
        if index > 0:
            await meeting.known.wait()
        place = structs.replace(self._spec(index).rank, rendezvous=meeting.address)
        start = Start(config, place, self.model_path, self.tuning, self.tokenizer_path)
        ready = await rank.start(start, config.start_timeout, meeting.learn)
        meeting.known.set()  # a runner without collectives announces nothing
        log.info("worker ready", worker=rank.transport.name, incarnation=self.incarnation, **ready.timings)
        infos[index] = ready.info

    async def _send_canaries(self) -> None:
        """Ask idle workers for an answer through their step loop; busy ones give answers anyway."""
        while True:
            await trio.sleep(self._config.health_interval)
            if all(rank.watchdog.is_idle for rank in self._ranks):
                self._last_ping += 1
                await self._send(Ping(self._last_ping), ("ping", self._last_ping))

    def _take(self, index: int, message: FromWorker) -> None:
        match message:
            case StepResult():
                answered = self._settle(index, ("step", message.step_id))
                result = self._agreement.take(index, message) if answered else None
                if result is not None and self._deliver is not None:
                    self._deliver(result)
            case Pong():
                self._settle(index, ("ping", message.number))
            case AdapterKept():
                if self._settle(index, ("adapter", message.number)):
                    self._kept[index] = message
                    self._answered.set()
            case BlocksExported() | BlocksImported():
                transfer = self._transfers.get(message.number)
                if self._settle(index, ("blocks", message.number)) and transfer is not None:
                    transfer.take(index, message)
                    if transfer.done.is_set():
                        del self._transfers[message.number]
            case Asleep() | Awake():
                if self._settle(index, "sleep" if isinstance(message, Asleep) else "wake"):
                    self._answers[index] = message
                    self._answered.set()

    def _settle(self, index: int, owed: object) -> bool:
        """Note an answer, and how long it took; return False for a duplicate, which is not owed."""
        since = self._ranks[index].watchdog.settle(owed)
        if since is not None:
            self._round_trip = trio.current_time(), trio.current_time() - since
        return since is not None

    async def _stop_ranks(self) -> None:
        with cleanup_scope() as scope:
            budget = stop_budget.RANK_SHARE * max(0.0, scope.deadline - trio.current_time())
            if not self._ready:  # there is nothing to finish
                budget = min(budget, stop_budget.STARTING_WORKER)
            reports: list[StopReport] = []
            async with trio.open_nursery() as nursery:
                for rank in self._ranks:
                    nursery.start_soon(_stop_rank, rank.transport, budget, reports)
            # A thread that was abandoned in an earlier incarnation still exists.
            self.stop_reports = [r for r in self.stop_reports if r.outcome == "abandoned"] + reports
        self._ranks = []

    def _spec(self, rank: int) -> WorkerSpec:
        config, place = self._config, placement.place(self._config, self.slot, rank)
        devices = config.device_ids or tuple(range(config.world_size * config.replicas))
        rank_spec = RankSpec(
            replica=self.replica,
            rank=rank,
            world_size=config.world_size,
            epoch=self.incarnation,
            rendezvous=rendezvous(config, self.slot, self.incarnation),
            num_stages=config.pp_size,
            device_index=None if config.device == "cpu" else devices[place.local],
            shares_memory=place.shares_memory,
        )
        return WorkerSpec(
            rank_spec,
            config.runner,
            config.cpu_threads,
            node=place.node,
            meets_on=place.meets_on,
            alone=place.alone,
        )


def rendezvous(config: EngineConfig, slot: int, incarnation: int) -> str:
    """Return the address that rank 0 listens at; with port 0, it chooses a free one and announces it.

    Ranks on other hosts come there through their agents: see `ullm.nodes`.
    """
    if config.nnodes > 1:
        return "127.0.0.1:0"
    port = rendezvous_port(config, slot, incarnation) if config.nccl_port else 0
    return f"{config.master_addr}:{port}"


def rendezvous_port(config: EngineConfig, slot: int, incarnation: int) -> int:
    """Return the port where the ranks of one incarnation meet, if a first port is given.

    It differs from those of other slots and of the incarnations just before, because a rank must not meet
    what is left of them. All are in ``nccl_port … nccl_port + RENDEZVOUS_ROUNDS * replicas - 1``.
    """
    return config.nccl_port + slot + config.replicas * ((incarnation - 1) % RENDEZVOUS_ROUNDS)


async def _stop_rank(transport: Transport, budget: float, reports: list[StopReport]) -> None:
    report = await transport.stop(budget)
    reports.append(report)
    log.debug("worker ended", worker=report.name, outcome=report.outcome, seconds=round(report.seconds, 3))
