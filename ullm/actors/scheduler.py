"""The scheduler actor: carries out what the pure scheduler decides, one step ahead of the workers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import trio

from ullm.actors.base import Mailbox
from ullm.actors.group import WorkerGroup
from ullm.actors.router import ReplicaDown, ReplicaUp, Router, Tokens
from ullm.config import EngineConfig
from ullm.core.blocks import BlockPool
from ullm.core.request import RequestRecord
from ullm.core.scheduling import Scheduler, SchedulerStatistics
from ullm.core.sequence import Sequence
from ullm.messages import ModelInfo, Step, StepResult


@dataclass(frozen=True, slots=True)
class Submit:
    """Run a request, from its prompt and the tokens it has emitted."""

    record: RequestRecord


@dataclass(frozen=True, slots=True)
class Abort:
    """Forget a request."""

    seq_id: int


SchedulerMessage = Submit | Abort | StepResult


class SchedulerActor:
    """Keeps one worker group busy.

    Nothing here must survive: each start begins with an empty scheduler, and the router submits what
    is to be done.

    Args:
        config: batch limits, and how many steps to plan ahead.
        group: the workers.
        router: where requests come from and tokens go to.
    """

    def __init__(self, config: EngineConfig, group: WorkerGroup, router: Router) -> None:
        self._config = config
        self._group = group
        self._router = router
        self._core: Scheduler | None = None
        self._incarnation = 0
        self._in_flight: deque[Step] = deque()

    def statistics(self) -> SchedulerStatistics | None:
        """What is in the scheduler; None before it has started."""
        return self._core.statistics() if self._core else None

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """The supervised child: ready when the workers have forgotten what was before."""
        group, mailbox = self._group, Mailbox[SchedulerMessage](float("inf"), "scheduler")
        assert group.info is not None, "the group is started before its scheduler"
        self._in_flight.clear()
        last_step = await group.attach(mailbox.send_nowait)
        self._core = new_scheduler(self._config, group.info, last_step)
        # Unique over restarts of either: a scheduler may restart while its group lives on.
        self._incarnation += 1
        epoch = self._incarnation
        self._router.mailbox.send_nowait(
            ReplicaUp(
                group.replica,
                epoch,
                submit=lambda record: mailbox.send_nowait(Submit(record)),
                abort=lambda seq_id: mailbox.send_nowait(Abort(seq_id)),
            )
        )
        crashed = True
        try:
            task_status.started()
            await self._loop(self._core, mailbox, epoch)
        except trio.Cancelled:
            crashed = not group.alive
            raise
        finally:
            group.detach()
            in_step = frozenset(row.seq_id for step in self._in_flight for row in step.rows)
            self._router.mailbox.send_nowait(ReplicaDown(group.replica, epoch, in_step, crashed))

    async def _loop(self, core: Scheduler, mailbox: Mailbox[SchedulerMessage], epoch: int) -> None:
        while True:
            while len(self._in_flight) <= self._config.steps_ahead and (step := core.schedule()):
                self._in_flight.append(step)
                await self._group.send(step)
            self._handle(core, await mailbox.receive(), epoch)
            # All that has arrived meanwhile goes into the next plan.
            while mailbox.statistics().queued:
                self._handle(core, mailbox.receive_nowait(), epoch)

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


def new_scheduler(config: EngineConfig, info: ModelInfo, last_step: int = 0) -> Scheduler:
    """A scheduler over the KV blocks that the workers have."""
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
