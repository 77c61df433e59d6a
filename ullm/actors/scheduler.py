"""The scheduler actor: carries out what the pure scheduler decides, one step ahead of the workers."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

import trio

from ullm.actors.block_transfer import AnyTransfer, BlockTransfer
from ullm.actors.router import Router
from ullm.actors.router_messages import ReplicaDown, ReplicaUp, Tokens, Unsendable
from ullm.actors.worker_group import WorkerGroup
from ullm.config import EngineConfig
from ullm.errors import FrameBroken
from ullm.faults import FaultInjector
from ullm.protocol.frames import check_sendable
from ullm.protocol.messages import ExportBlocks, ImportBlocks, ModelInfo, Step, StepResult
from ullm.scheduling import placement
from ullm.scheduling.block_pool import BlockPool
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.scheduler import Scheduler, introduction
from ullm.scheduling.sequence import Sequence
from ullm.scheduling.statistics import SchedulerStatistics
from ullm.supervision.actor import Mailbox

MESSAGES_AT_ONCE = 16
"""Messages that are handled before other tasks run: each of hundreds of choices may bring a long prompt."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Run a request, as it was when it was submitted.

    Not its record: the router may have taken that back by the time that this is read, and given it another
    number, of which the `Abort` that follows does not know.
    """

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop a request."""

    seq_id: int


@dataclass(frozen=True, slots=True)
class Recheck:
    """Something that the loop depends on has changed."""


SchedulerMessage = (
    Submit | Abort | StepResult | Recheck | BlockTransfer[ExportBlocks] | BlockTransfer[ImportBlocks]
)


@dataclass(frozen=True, slots=True)
class MailboxHandle:
    """A `SchedulerHandle` for one incarnation of a scheduler, which has a mailbox of its own."""

    mailbox: Mailbox[SchedulerMessage]

    def submit(self, record: RequestRecord) -> None:
        """See `SchedulerHandle`."""
        self.mailbox.send_nowait(Submit(to_sequence(record)))

    def abort(self, seq_id: int) -> None:
        """See `SchedulerHandle`."""
        self.mailbox.send_nowait(Abort(seq_id))

    def transfer(self, transfer: AnyTransfer) -> None:
        """See `SchedulerHandle`."""
        self.mailbox.send_nowait(transfer)


@dataclass(slots=True, eq=False)
class Pause:
    """A pause of the scheduler, and how deeply its workers sleep meanwhile.

    Args:
        level: 0: only plan no steps; 1 and 2: see `ullm.protocol.messages.Sleep`.
        reached: set once the scheduler is paused and the workers sleep.
        given_back: bytes freed by the workers.
    """

    level: int
    reached: trio.Event
    given_back: int = 0


class SchedulerActor:
    """Keeps one worker group busy.

    None of its state needs to survive: each start begins with an empty scheduler, and the router submits
    the requests again.

    Args:
        config: batch limits, and how many steps to plan ahead.
        group: the workers.
        router: the source of requests, and the receiver of tokens.
        faults: faults to inject at the point ``scheduler.step``.
    """

    def __init__(
        self, config: EngineConfig, group: WorkerGroup, router: Router, faults: FaultInjector
    ) -> None:
        self._config = config
        self._group = group
        self._router = router
        self._faults = faults
        self._scheduler: Scheduler | None = None
        self._incarnation = 0
        self._in_flight: deque[Step] = deque()
        self._transfers: deque[AnyTransfer] = deque()
        self._mailbox: Mailbox[SchedulerMessage] | None = None
        self._pause: Pause | None = None

    def pause(self, level: int) -> Pause:
        """Plan no more steps; at level 1 and 2, also give all requests back and have the workers sleep.

        The pause lasts until `resume`, over restarts of this actor and of its workers. May be called again
        with a deeper level.
        """
        self._pause = Pause(level, trio.Event(), self._pause.given_back if self._pause is not None else 0)
        self._recheck()
        return self._pause

    def resume(self) -> None:
        """End the pause. The router is told when the workers are up again."""
        self._pause = None
        self._recheck()

    def give_up(self) -> None:
        """Release the tasks that wait for a pause: this actor will not run again."""
        if self._pause is not None:
            self._pause.reached.set()

    def statistics(self) -> SchedulerStatistics | None:
        """Return what is in the scheduler; None while it serves nobody."""
        return self._scheduler.statistics() if self._scheduler else None

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Run as a supervised child, which is ready once the workers have dropped their former sequences."""
        last_step = await self._attach()
        task_status.started()
        while True:
            if self._pause is None or self._pause.level == 0:
                await self._serve(last_step)
            await self._sleep()
            last_step = await self._attach()

    async def _attach(self) -> int:
        self._mailbox = Mailbox[SchedulerMessage](float("inf"), "scheduler")
        self._in_flight.clear()
        self._transfers.clear()
        return await self._group.attach(self._mailbox.send_nowait)

    async def _serve(self, last_step: int) -> None:
        """Run requests of the router until a pause of level 1 or 2, or the loss of the workers."""
        group, mailbox = self._group, self._mailbox
        assert group.info is not None, "the group is started before its scheduler"
        assert mailbox is not None, "results are attached before they can come"
        config = self._config.on_device(group.info.device)
        pool = BlockPool(group.info.num_blocks)
        scheduler = self._scheduler = new_scheduler(config, group.info, last_step, pool)
        # Not the group's incarnation: a scheduler may restart while its group lives on.
        self._incarnation += 1
        handle = MailboxHandle(mailbox)
        up = ReplicaUp(
            group.replica,
            self._incarnation,
            config.max_bs,
            handle,
            pool,
            group.info.block_size,
            role=config.role_of(group.slot),
            info=group.info,
            ranks=config.world_size,
            shares_memory=config.worker_transport != "ray"
            and all(placement.place(config, group.slot, rank).node == 0 for rank in range(config.world_size)),
        )
        self._router.mailbox.send_nowait(up)
        crashed = True
        try:
            await self._loop(scheduler, mailbox)
            crashed = False
        except trio.Cancelled:
            crashed = not group.alive
            raise
        finally:
            up.ended.set()
            group.detach()
            in_step = frozenset(entry.seq_id for step in self._in_flight for entry in step.scheduled)
            down = ReplicaDown(group.replica, self._incarnation, in_step, crashed)
            self._router.mailbox.send_nowait(down)
            self._scheduler = None  # nothing runs here until the workers are up again

    async def _loop(self, scheduler: Scheduler, mailbox: Mailbox[SchedulerMessage]) -> None:
        """Plan steps and apply their results; return when a pause of level 1 or 2 has no step in flight."""
        while True:
            await self._send_transfers()
            pause = self._pause
            while (
                pause is None
                and len(self._in_flight) <= scheduler.steps_ahead
                and (step := scheduler.schedule()) is not None
            ):
                await self._faults.at("scheduler.step")
                self._in_flight.append(step)
                await self._group.send(step)
            if pause is not None and not self._in_flight:
                if pause.level > 0:
                    return
                pause.reached.set()
            self._handle(scheduler, await mailbox.receive())
            # Everything that has arrived meanwhile goes into the next plan.
            for handled in itertools.count(1):
                if not mailbox.statistics().queued:
                    break
                self._handle(scheduler, mailbox.receive_nowait())
                if handled % MESSAGES_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()

    async def _send_transfers(self) -> None:
        """Send transfers of KV blocks: after all steps planned so far, and before all later ones."""
        while self._transfers:
            transfer = self._transfers.popleft()
            if not transfer.withdrawn:
                await self._group.send_blocks(transfer)

    async def _sleep(self) -> None:
        """Put the workers to sleep as deeply as the pause says, and wake them when it is over."""
        depth = 0
        assert self._mailbox is not None, "it was made when the workers were attached"
        while (pause := self._pause) is not None:
            if pause.level > depth:
                pause.given_back += await self._group.sleep(pause.level)
                depth = pause.level
            pause.reached.set()
            await self._mailbox.receive()
        if depth > 0:
            await self._group.wake()

    def _recheck(self) -> None:
        if self._mailbox is not None:
            self._mailbox.send_nowait(Recheck())

    def _handle(self, scheduler: Scheduler, message: SchedulerMessage) -> None:
        match message:
            case StepResult():
                self._in_flight.popleft()
                events = scheduler.apply(message)
                self._router.mailbox.send_nowait(Tokens(self._group.replica, self._incarnation, events))
            case Submit(sequence):
                self._add(scheduler, sequence)
            case Abort(seq_id):
                scheduler.abort(seq_id)
            case BlockTransfer():
                self._transfers.append(message)
            case Recheck():
                pass

    def _add(self, scheduler: Scheduler, sequence: Sequence) -> None:
        """Add a sequence, unless a step with it could not be sent: it would cost the worker and a number."""
        try:
            check_sendable(introduction(sequence), len(sequence.token_ids))
        except FrameBroken as error:
            self._router.mailbox.send_nowait(Unsendable(sequence.seq_id, str(error)))
        else:
            scheduler.add(sequence)


def new_scheduler(
    config: EngineConfig, info: ModelInfo, last_step: int = 0, pool: BlockPool | None = None
) -> Scheduler:
    """Return a scheduler over the workers' KV blocks.

    Args:
        config: with its limits decided, see `EngineConfig.on_device`.
        last_step: number of the last step that the workers were sent.
        pool: the blocks; default: a new pool.
    """
    return Scheduler(
        config,
        pool or BlockPool(info.num_blocks),
        info.block_size,
        info.eos_token_ids,
        prefix_cache=config.prefix_cache,
        last_step=last_step,
        stages=config.pp_size,
        window=info.window,
    )


def to_sequence(record: RequestRecord) -> Sequence:
    """Return a new sequence for a request: its prompt and the tokens that it has emitted."""
    prompt = record.prompt_token_ids
    return Sequence(
        seq_id=record.seq_id,
        token_ids=[*prompt, *record.token_ids] if record.token_ids else prompt,
        num_prompt_tokens=len(prompt),
        params=record.params,
        max_total=record.max_total,
        queue_key=record.queue_key,
        grammar=record.grammar,
        adapter=record.adapter,
        prompt_hashes=record.prompt_hashes,
    )
