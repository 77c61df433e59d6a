"""The worker group: the ranks of one replica, which live and die together.

The ranks must start at the same time, because they meet in a rendezvous, and none is of use without
the others. So they are tasks of one nursery: the first one to be lost ends them all, and the group's
supervisor starts a new incarnation, with a higher epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

import trio

from ullm import errors
from ullm.actors.base import cleanup_scope
from ullm.actors.transports.base import OpenTransport, StopReport, Transport, WorkerSpec
from ullm.config import EngineConfig
from ullm.errors import ConfigError, ModelError, UllmError, WorkerFailed, WorkerLost, first_cause
from ullm.logs import get_logger
from ullm.messages import (
    Failed,
    FromWorker,
    ModelInfo,
    NotUnderstood,
    Progress,
    RankSpec,
    Ready,
    Start,
    Step,
    StepResult,
)

log = get_logger("ullm.group")


STARTING_GRACE = 1.0
"""Seconds for a rank that is not ready yet to end by itself."""


class _Watchdog:
    """Of one rank: which results it owes, and when its next sign of life is due."""

    def __init__(self) -> None:
        self.owed: set[int] = set()
        self.scope = trio.CancelScope()

    def expect(self, due: float) -> None:
        """Wait until the trio time ``due``; infinity: nothing is owed."""
        self.scope.deadline = due


class WorkerGroup:
    """Starts the ranks of one replica, feeds them steps, and notices when one dies or hangs.

    Args:
        replica: index of the replica.
        config: how many ranks, and how long they may take.
        open_transport: how to start one.
    """

    def __init__(self, replica: int, config: EngineConfig, open_transport: OpenTransport) -> None:
        self.replica = replica
        self.epoch = 0
        self.model_path = ""
        self.info: ModelInfo | None = None
        self.stop_reports: list[StopReport] = []
        self._config = config
        self._open_transport = open_transport
        self._transports: list[Transport] = []
        self._watchdogs: list[_Watchdog] = []
        self._known: set[int] = set()
        self._starting: dict[str, Progress] = {}
        self._last_step = 0
        self._ready = False
        self._deliver: Callable[[StepResult], None] | None = None

    # --- for the scheduler -------------------------------------------------------------------------

    async def send(self, step: Step) -> None:
        """Send a step to every rank; its result goes to the attached scheduler."""
        self._last_step = step.step_id
        self._known.difference_update(step.forget)
        self._known.update(new.seq_id for new in step.new)
        for transport, watchdog in zip(self._transports, self._watchdogs, strict=True):
            if not watchdog.owed:
                watchdog.expect(trio.current_time() + self._config.step_timeout)
            watchdog.owed.add(step.step_id)
            try:
                await transport.send(step)
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
        await self.send(Step(step_id=barrier, rows=[], forget=sorted(self._known)))
        return barrier

    def detach(self) -> None:
        """Drop results until a scheduler attaches again."""
        self._deliver = None

    def kill(self) -> None:
        """End every rank now."""
        for transport in self._transports:
            transport.kill()

    @property
    def alive(self) -> bool:
        """Whether the group is whole."""
        return bool(self._transports) and all(transport.alive() for transport in self._transports)

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
        self.epoch += 1
        self._known.clear()
        self._ready = False
        self._starting.clear()
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
        self._watchdogs = [_Watchdog() for _ in self._transports]
        try:
            async with trio.open_nursery() as starting:
                for rank in range(len(self._transports)):
                    starting.start_soon(self._start_rank, rank, infos)
            self.info = infos[0]
            async with trio.open_nursery() as watching:
                for rank in range(len(self._transports)):
                    watching.start_soon(self._watch_rank, rank)
                self._ready = True
                task_status.started(infos[0])
        except BaseExceptionGroup as group:
            raise first_cause(group) from group

    async def _start_rank(self, rank: int, infos: list[ModelInfo]) -> None:
        transport, patience = self._transports[rank], self._config.start_timeout
        with trio.move_on_after(patience):
            await transport.send(Start(self._config, self._spec(rank).rank, self.model_path))
            while not isinstance(message := await self._sign_of_life(transport), Ready):
                log.debug("worker starting", worker=transport.name, message=message)
            log.info("worker ready", worker=transport.name, epoch=self.epoch, **message.timings)
            infos.append(message.info)
            return
        raise WorkerLost(transport.name, f"was not ready within --start-timeout {patience:g} s")

    async def _sign_of_life(self, transport: Transport) -> FromWorker:
        """The next message of a worker that starts; what takes long is announced by `Progress`."""
        last = self._starting.get(transport.name, Progress("start", self._config.start_timeout))
        with trio.move_on_after(last.budget):
            message = _checked(transport, await transport.receive())
            if isinstance(message, Progress):
                self._starting[transport.name] = message
            return message
        raise WorkerLost(
            transport.name, f"gave no sign of life for {last.budget:g} s at stage {last.stage!r}"
        )

    async def _watch_rank(self, rank: int) -> None:
        transport, watchdog = self._transports[rank], self._watchdogs[rank]
        with watchdog.scope:
            while True:
                self._take(rank, _checked(transport, await transport.receive()))
        raise WorkerLost(transport.name, f"made no progress for {self._config.step_timeout:g} s")

    def _take(self, rank: int, message: FromWorker) -> None:
        watchdog = self._watchdogs[rank]
        if isinstance(message, Progress):
            watchdog.expect(trio.current_time() + message.budget)
        elif isinstance(message, StepResult) and message.step_id in watchdog.owed:  # a doubled one is not
            watchdog.owed.remove(message.step_id)
            patience = self._config.step_timeout if watchdog.owed else float("inf")
            watchdog.expect(trio.current_time() + patience)
            if rank == 0 and self._deliver is not None:
                self._deliver(message)

    async def _stop_ranks(self) -> None:
        with cleanup_scope() as scope:
            budget = max(0.0, scope.deadline - trio.current_time())
            if not self._ready:  # nothing to finish
                budget = min(budget, STARTING_GRACE)
            reports: list[StopReport] = []
            async with trio.open_nursery() as nursery:
                for transport in self._transports:
                    nursery.start_soon(_stop_rank, transport, budget, reports)
            self.stop_reports = reports
        self._transports = []

    def _spec(self, rank: int) -> WorkerSpec:
        config = self._config
        first = self.replica * config.world_size
        devices = config.device_ids or tuple(range(config.world_size * config.replicas))
        rank_spec = RankSpec(
            replica=self.replica,
            rank=rank,
            world_size=config.world_size,
            epoch=self.epoch,
            # A port of its own for each incarnation: a rank must not meet what is left of the last one.
            rendezvous=f"127.0.0.1:{config.nccl_port + self.replica + config.replicas * (self.epoch - 1)}",
            device_index=None if config.device == "cpu" else devices[first + rank],
        )
        return WorkerSpec(rank_spec, config.runner, config.cpu_threads)


async def _stop_rank(transport: Transport, budget: float, reports: list[StopReport]) -> None:
    report = await transport.stop(budget)
    reports.append(report)
    log.debug("worker ended", worker=report.name, outcome=report.outcome, seconds=round(report.seconds, 3))


def _checked(transport: Transport, message: FromWorker) -> FromWorker:
    """The message, unless it says that the worker failed."""
    match message:
        case Failed():
            log.debug("worker failed", worker=transport.name, traceback=message.traceback)
            raise failure(transport.name, message)
        case NotUnderstood():
            raise WorkerFailed(transport.name, f"did not understand a message: {message.detail}")
    return message


def failure(name: str, message: Failed) -> UllmError:
    """The worker's exception as one of the engine's.

    An error that tells the user what to do comes back as itself, word for word; anything else is the
    loss of the worker.
    """
    kind = getattr(errors, message.kind, None)
    if isinstance(kind, type) and issubclass(kind, (ModelError, ConfigError)):
        error = kind.__new__(kind)  # its constructor would build the message a second time
        error.args = (message.message,)
        return error
    return WorkerFailed(name, f"failed: {message.kind}: {message.message}")
