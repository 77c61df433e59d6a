"""The scheduler actor: carries out what the pure scheduler decides, one step ahead of the workers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import trio

from ullm.actors.router import Router
from ullm.actors.router_messages import ReplicaDown, ReplicaUp, Tokens
from ullm.actors.worker_group import WorkerGroup
from ullm.config import EngineConfig
from ullm.faults import FaultInjector
from ullm.protocol.messages import ModelInfo, Step, StepResult
from ullm.scheduling.block_pool import BlockPool
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.scheduler import Scheduler
from ullm.scheduling.sequence import Sequence
from ullm.scheduling.statistics import SchedulerStatistics
from ullm.supervision.actor import Mailbox


@dataclass(frozen=True, slots=True)
class Submit:
    """Run a request, from its prompt and the tokens it has emitted."""

    record: RequestRecord


@dataclass(frozen=True, slots=True)
class Abort:
    """Forget a request."""

    seq_id: int


@dataclass(slots=True, eq=False)
class Pause:
    """A pause of the scheduler, and how deep its workers sleep meanwhile.

    Args:
        reached: set when it is as asked for.
        given_back: bytes, by the workers.
    """

    level: int
    reached: trio.Event
    given_back: int = 0


@dataclass(frozen=True, slots=True)
class Recheck:
    """Something that the loop depends on has changed."""


SchedulerMessage = Submit | Abort | StepResult | Recheck


class SchedulerActor:
    """Keeps one worker group busy.

    Nothing here must survive: each start begins with an empty scheduler, and the router submits what
    is to be done.

    Args:
        config: batch limits, and how many steps to plan ahead.
        group: the workers.
        router: where requests come from and tokens go to.
        faults: what shall go wrong at the point ``scheduler.step``.
    """

    def __init__(
        self, config: EngineConfig, group: WorkerGroup, router: Router, faults: FaultInjector
    ) -> None:
        self._config = config
        self._group = group
        self._router = router
        self._faults = faults
        self._core: Scheduler | None = None
        self._epoch = 0
        self._in_flight: deque[Step] = deque()
        self._mailbox: Mailbox[SchedulerMessage] | None = None
        self._pause: Pause | None = None

    def pause(self, level: int) -> Pause:
        """Plan no more steps; at level 1 and 2, give all requests back and have the workers sleep.

        Lasts until `resume`, over restarts of this actor and of its workers. May be called again with a
        deeper level.
        """
        self._pause = Pause(level, trio.Event(), self._pause.given_back if self._pause is not None else 0)
        self._recheck()
        return self._pause

    def resume(self) -> None:
        """End the pause. The router hears when the workers are up again."""
        self._pause = None
        self._recheck()

    def give_up(self) -> None:
        """It will not run again: nobody shall wait for its pause."""
        if self._pause is not None:
            self._pause.reached.set()

    def statistics(self) -> SchedulerStatistics | None:
        """What is in the scheduler; None before it has started."""
        return self._core.statistics() if self._core else None

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """The supervised child: ready when the workers have forgotten what was before."""
        self._core = None
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
        return await self._group.attach(self._mailbox.send_nowait)

    async def _serve(self, last_step: int) -> None:
        """Take requests from the router until a deep pause is asked for, or the workers are lost."""
        group, mailbox = self._group, self._mailbox
        assert group.info is not None, "the group is started before its scheduler"
        assert mailbox is not None, "results are attached before they can come"
        config = self._config.on_device(group.info.device)
        core = self._core = new_scheduler(config, group.info, last_step)
        # Unique over restarts of either: a scheduler may restart while its group lives on.
        self._epoch += 1
        epoch = self._epoch
        self._router.mailbox.send_nowait(
            ReplicaUp(
                group.replica,
                epoch,
                config.max_bs,
                submit=lambda record: mailbox.send_nowait(Submit(record)),
                abort=lambda seq_id: mailbox.send_nowait(Abort(seq_id)),
            )
        )
        crashed = True
        try:
            await self._loop(core, mailbox, epoch)
            crashed = False
        except trio.Cancelled:
            crashed = not group.alive
            raise
        finally:
            group.detach()
            in_step = frozenset(row.seq_id for step in self._in_flight for row in step.scheduled)
            self._router.mailbox.send_nowait(ReplicaDown(group.replica, epoch, in_step, crashed))

    async def _loop(self, core: Scheduler, mailbox: Mailbox[SchedulerMessage], epoch: int) -> None:
        """Ends when a deep pause is asked for and no step is in flight."""
        while True:
            pause = self._pause
            while (
                pause is None
                and len(self._in_flight) <= core.steps_ahead
                and (step := core.schedule()) is not None
            ):
                await self._faults.at("scheduler.step")
                self._in_flight.append(step)
                await self._group.send(step)
            if pause is not None and not self._in_flight:
                if pause.level > 0:
                    return
                pause.reached.set()
            self._handle(core, await mailbox.receive(), epoch)
            # All that has arrived meanwhile goes into the next plan.
            while mailbox.statistics().queued:
                self._handle(core, mailbox.receive_nowait(), epoch)

    async def _sleep(self) -> None:
        """Have the workers sleep as deep as is asked for, and wake them when it is over."""
        depth, self._core = 0, None
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

    def _handle(self, core: Scheduler, message: SchedulerMessage, epoch: int) -> None:
        match message:
            case StepResult():
                self._in_flight.popleft()
                events = core.apply(message)
                self._router.mailbox.send_nowait(Tokens(self._group.replica, epoch, events))
            case Submit(record):
                core.add(to_sequence(record))
            case Abort(seq_id):
                core.abort(seq_id)
            case Recheck():
                pass


def new_scheduler(config: EngineConfig, info: ModelInfo, last_step: int = 0) -> Scheduler:
    """A scheduler over the KV blocks that the workers have.

    Args:
        config: with limits that are decided, see `EngineConfig.on_device`.
    """
    return Scheduler(
        config,
        BlockPool(info.num_blocks),
        info.block_size,
        info.eos_token_ids,
        prefix_cache=config.prefix_cache,
        last_step=last_step,
    )


def to_sequence(record: RequestRecord) -> Sequence:
    """A fresh sequence for a request: its prompt, and what it has emitted already."""
    return Sequence(
        seq_id=record.seq_id,
        token_ids=[*record.prompt_token_ids, *record.token_ids],
        num_prompt_tokens=len(record.prompt_token_ids),
        params=record.params,
        max_total=record.max_total,
        order=record.order,
    )
