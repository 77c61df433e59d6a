"""Standby workers: processes that have imported their libraries and mapped the weights, and wait to be used.

A new worker takes most of a second to import PyTorch. A standby one is ready some hundredths of a second
after its `Start`, so the loss of a worker costs its clients little more than computing their contexts again.

The pool stands between worker groups and their transport: `StandbyPool.open` gives a group a standby worker
where one is prepared, otherwise a new one. Standby workers of one kind are alike until `Start` names their
rank. One that dies is replaced, after a delay that grows with each loss; workers in use are not affected.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import cast

import trio

from ullm.actors.standby_worker import StandbyTarget, StandbyTransport, StandbyWorker, WorkerKind, kind_of
from ullm.actors.transports.base import OpenTransport, Transport, WorkerSpec
from ullm.config import GIB, EngineConfig
from ullm.errors import WorkerLost
from ullm.logs import get_logger
from ullm.machine import available_memory
from ullm.protocol import stop_budget
from ullm.protocol.messages import Failed, Prepare, Prepared
from ullm.supervision import cleanup_scope, exponential_backoff

log = get_logger(__name__)

SETTLE_SECONDS = 1.0
"""Delay from the use of a standby, or the end of a start, to the next standby: workers in use come first."""
BACKOFF_SECONDS, BACKOFF_LIMIT = 1.0, 60.0
"""Delay from the loss of a standby to the next one: doubled with each loss in a row, up to the limit."""
STEADY_SECONDS = 60.0
"""Lifetime after which the loss of a standby no longer counts as one in a row."""
MEMORY_RESERVE = 1 * GIB
"""Bytes that must be available beyond the weights, unless ``standby_workers`` is set."""
MEMORY_SECONDS = 30.0
"""Interval between checks of the memory while there is too little."""
PREPARE_SECONDS = 300.0
"""How long a standby may take to prepare before it counts as hung."""


@dataclass(frozen=True)
class StandbyStatistics:
    """Standby workers in the pool now, and counts since the start.

    Args:
        prepared: standbys ready for use.
        preparing: standbys not ready yet.
        taken_total: standbys that became workers.
        lost_total: standbys that died.
        pids: process ids of the standbys that are processes.
    """

    prepared: int = 0
    preparing: int = 0
    taken_total: int = 0
    lost_total: int = 0
    pids: tuple[int, ...] = ()


class StandbyPool:
    """Keeps standbys for the workers in use, and hands them out.

    Args:
        open_transport: starts a worker.
        memory: returns the bytes available now.
    """

    def __init__(self, open_transport: OpenTransport, memory: Callable[[], int] = available_memory) -> None:
        self._open_transport = open_transport
        self._memory = memory
        self._kinds: dict[tuple[object, ...], WorkerKind] = {}
        self._target: StandbyTarget | None = None
        self._changed = trio.Event()
        self._taken = self._lost = 0

    # --- for worker groups ---------------------------------------------------------------------------

    @asynccontextmanager
    async def open(self, spec: WorkerSpec) -> AsyncIterator[Transport]:
        """Open a standby worker where one is prepared, otherwise a new one; an `OpenTransport`."""
        kind = self._kinds.setdefault(kind_of(spec), WorkerKind(spec))
        kind.spec, kind.serving = spec, kind.serving + 1
        try:
            standby = self._take(kind)
            self._changed.set()
            if standby is None:
                async with self._open_transport(spec) as transport:
                    yield transport
            else:
                async with self._use(standby, spec) as transport:
                    yield transport
        finally:
            kind.serving -= 1

    def _take(self, kind: WorkerKind) -> StandbyWorker | None:
        standby = next((each for each in kind.standbys if each.usable), None)
        for each in list(kind.standbys):
            if each is standby or (each.prepared and not each.usable):  # suspended or dying
                kind.standbys.remove(each)
                each.taken = each is standby
                each.leave.cancel()
        if standby is not None:
            self._taken += 1
            kind.losses, kind.not_before = 0, trio.current_time() + SETTLE_SECONDS
        return standby

    @asynccontextmanager
    async def _use(self, standby: StandbyWorker, spec: WorkerSpec) -> AsyncIterator[Transport]:
        """Use a standby as the worker that ``spec`` describes; on leaving, it has ended."""
        transport = standby.transport
        assert transport is not None, "only a started standby is taken"
        transport.name = spec.rank.name
        log.info("standby worker takes over", worker=transport.name, pid=transport.pid)
        try:
            yield transport
        finally:
            standby.released.set()
            with trio.CancelScope(shield=True):  # until its transport is closed
                await standby.gone.wait()

    # --- for the engine ------------------------------------------------------------------------------

    def prepare(self, config: EngineConfig, model_path: str, need: int) -> None:
        """Prepare standbys for a model; called when all workers are ready, and after a reload or a pause.

        Args:
            config: ``standby_workers`` says how many for each worker; None: one, while memory allows.
            need: bytes of memory that a worker takes for weights.
        """
        former, self._target = self._target, StandbyTarget(config, model_path, need)
        for kind in self._kinds.values():
            kind.not_before = trio.current_time() + SETTLE_SECONDS
            if former is not None and former != self._target:
                self._retire(kind, 0)
        self._changed.set()

    async def pause(self) -> None:
        """End all standbys, wait until they are gone, and start none until `prepare`."""
        self._target = None
        standbys = self._standbys()
        for kind in self._kinds.values():
            self._retire(kind, 0)
        for standby in standbys:
            await standby.gone.wait()

    def statistics(self) -> StandbyStatistics:
        """Return what is in the pool as a frozen value."""
        standbys = self._standbys()
        prepared = sum(standby.prepared for standby in standbys)
        pids = [standby.transport.pid for standby in standbys if standby.transport is not None]
        known = tuple(pid for pid in pids if pid is not None)
        return StandbyStatistics(prepared, len(standbys) - prepared, self._taken, self._lost, known)

    # --- the supervised child ------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Start standbys wherever they are missing. Taken ones live on as tasks of this one."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            while True:
                # One time for all: what is not due yet for one kind must be due later for the wait.
                self._changed, now = trio.Event(), trio.current_time()
                for kind in self._kinds.values():
                    for standby in self._complete(kind, now):
                        nursery.start_soon(self._keep, kind, standby)
                with trio.move_on_at(self._next_check(now)):
                    await self._changed.wait()

    def _complete(self, kind: WorkerKind, now: float) -> list[StandbyWorker]:
        """Return the missing standbys, to be started now; retire surplus ones."""
        target = self._target
        if target is None or now < kind.not_before:
            return []
        self._retire(kind, target.standbys * max(1, kind.serving))
        missing = max(0, target.standbys * kind.serving - len(kind.standbys))
        required = target.config.standby_workers is not None
        if missing and not required and self._memory() < target.need + MEMORY_RESERVE:
            log.debug("no memory for a standby worker", worker=kind.spec.rank.name)
            kind.not_before = now + MEMORY_SECONDS
            return []
        new = [StandbyWorker(target, now) for _ in range(missing)]
        kind.standbys += new
        return new

    def _next_check(self, now: float) -> float:
        times = [kind.not_before for kind in self._kinds.values()]
        return min((time for time in times if time > now), default=math.inf)

    def _retire(self, kind: WorkerKind, keep: int) -> None:
        """End standbys, the newest first, until at most ``keep`` are left."""
        while len(kind.standbys) > keep:
            kind.standbys.pop().leave.cancel()

    def _standbys(self) -> list[StandbyWorker]:
        return [standby for kind in self._kinds.values() for standby in kind.standbys]

    # --- one standby -----------------------------------------------------------------------------------

    async def _keep(self, kind: WorkerKind, standby: StandbyWorker) -> None:
        """Run one standby from its start to its end, whether the pool or a group has it meanwhile."""
        target = standby.target
        try:
            async with self._open_transport(replace(kind.spec, standby=True)) as transport:
                standby.transport = cast(StandbyTransport, transport)
                try:
                    await self._hold(standby, Prepare(target.config, kind.spec.rank, target.model_path))
                finally:
                    if standby.prepared and not standby.taken:  # otherwise there is nothing to stop in order
                        with cleanup_scope(stop_budget.STANDBY_WORKER):
                            await transport.stop(stop_budget.STANDBY_WORKER)
        except Exception as error:  # the loss of a standby must not disturb workers in use
            self._count_loss(kind, standby, error)
        finally:
            if standby in kind.standbys:
                kind.standbys.remove(standby)
            standby.gone.set()
            self._changed.set()

    async def _hold(self, standby: StandbyWorker, prepare: Prepare) -> None:
        """Prepare a standby, and wait until it is taken and released, or retired.

        Raises:
            WorkerLost: it died or hangs.
        """
        transport = standby.transport
        assert transport is not None, "it is started"
        with standby.leave:
            await transport.send(prepare)
            with trio.move_on_after(PREPARE_SECONDS):
                await _wait_prepared(transport)
                standby.prepared = True
            if not standby.prepared:
                raise WorkerLost(transport.name, f"was not prepared within {PREPARE_SECONDS:g} s")
            log.debug("standby worker prepared", worker=transport.name, pid=transport.pid)
            while True:
                await transport.receive()  # raises when it dies
        if standby.taken:
            await standby.released.wait()

    def _count_loss(self, kind: WorkerKind, standby: StandbyWorker, error: Exception) -> None:
        log.warning("standby worker lost", worker=kind.spec.rank.name, cause=str(error))
        lived = trio.current_time() - standby.born
        kind.losses = 1 if lived >= STEADY_SECONDS else kind.losses + 1
        backoff = exponential_backoff(BACKOFF_SECONDS, BACKOFF_LIMIT)
        kind.not_before = trio.current_time() + backoff(kind.losses)
        self._lost += 1


async def _wait_prepared(transport: Transport) -> None:
    while not isinstance(message := await transport.receive(), Prepared):
        if isinstance(message, Failed):
            raise WorkerLost(transport.name, f"failed: {message.kind}: {message.message}")
