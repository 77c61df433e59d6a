"""Standby workers: processes that have imported all they need and mapped the weights, and wait to be used.

A worker that starts from nothing takes most of a second to import PyTorch. A spare one is ready some
hundredths of a second after its `Start`, so the loss of a worker costs its clients little more than
computing their contexts again.

The pool stands between worker groups and their transport: `StandbyPool.open` gives a group a spare worker
that suits it, else a fresh one. Spares are all alike until they are told who they are. Should one die,
another takes its place, later each time; nothing else happens.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import cast

import trio

from ullm.actors.spare_worker import Place, Spare, SpareTransport, Target, kind_of
from ullm.actors.transports.base import OpenTransport, Transport, WorkerSpec
from ullm.config import GIB, EngineConfig
from ullm.errors import WorkerLost
from ullm.logs import get_logger
from ullm.machine import available_memory
from ullm.protocol import stop_budget
from ullm.protocol.messages import Failed, Prepare, Prepared
from ullm.supervision.actor import cleanup_scope

log = get_logger("ullm.standby")

SETTLE_SECONDS = 1.0
"""From the use of a spare, or the end of a start, to the next spare: whoever serves comes first."""
BACKOFF_SECONDS, BACKOFF_LIMIT = 1.0, 60.0
"""From the loss of a spare to the next one: doubled with each loss in a row, up to the limit."""
STEADY_SECONDS = 60.0
"""A spare that has lived as long was not lost in a row."""
MEMORY_RESERVE = 1 * GIB
"""What must be available beyond the weights for a spare that nobody asked for."""
MEMORY_SECONDS = 30.0
"""How often memory is looked at while there is not enough."""
PREPARE_SECONDS = 300.0
"""A spare that takes longer hangs."""


@dataclass(frozen=True)
class StandbyStatistics:
    """What is in the pool, and counts since the start.

    Args:
        prepared: spares that wait.
        preparing: spares that are not so far yet.
        taken_total: spares that became workers.
        lost_total: spares that died.
        pids: of the spares that are processes.
    """

    prepared: int = 0
    preparing: int = 0
    taken_total: int = 0
    lost_total: int = 0
    pids: tuple[int, ...] = ()


class StandbyPool:
    """See the module.

    Args:
        open_transport: how to start a worker.
        memory: bytes available now.
    """

    def __init__(self, open_transport: OpenTransport, memory: Callable[[], int] = available_memory) -> None:
        self._open_transport = open_transport
        self._memory = memory
        self._places: dict[tuple[object, ...], Place] = {}
        self._target: Target | None = None
        self._changed = trio.Event()
        self._taken = self._lost = 0

    # --- for worker groups ---------------------------------------------------------------------------

    @asynccontextmanager
    async def open(self, spec: WorkerSpec) -> AsyncIterator[Transport]:
        """An `OpenTransport`: a spare worker where one is prepared, else a fresh one."""
        place = self._places.setdefault(kind_of(spec), Place(spec))
        place.spec, place.serving = spec, place.serving + 1
        try:
            spare = self._take(place)
            self._changed.set()
            if spare is None:
                async with self._open_transport(spec) as transport:
                    yield transport
            else:
                async with self._use(spare, spec) as transport:
                    yield transport
        finally:
            place.serving -= 1

    def _take(self, place: Place) -> Spare | None:
        spare = next((each for each in place.spares if each.usable), None)
        for each in list(place.spares):
            if each is spare or (each.prepared and not each.usable):  # it is suspended, or just dying
                place.spares.remove(each)
                each.taken = each is spare
                each.leave.cancel()
        if spare is not None:
            self._taken += 1
            place.losses, place.not_before = 0, trio.current_time() + SETTLE_SECONDS
        return spare

    @asynccontextmanager
    async def _use(self, spare: Spare, spec: WorkerSpec) -> AsyncIterator[Transport]:
        """Let a spare be the worker that ``spec`` describes; afterwards it has ended."""
        transport = spare.transport
        assert transport is not None, "what is taken was started"
        transport.name = spec.rank.name
        log.info("standby worker takes over", worker=transport.name, pid=transport.pid)
        try:
            yield transport
        finally:
            spare.released.set()
            with trio.CancelScope(shield=True):  # as long as the transport takes to be left
                await spare.gone.wait()

    # --- for the engine ------------------------------------------------------------------------------

    def prepare(self, config: EngineConfig, model_path: str, need: int) -> None:
        """Have spares for this from now on: called when all workers are ready, after a reload and a pause.

        Args:
            config: ``standby_workers`` for each worker; None: one, while memory allows.
            need: bytes of memory that a worker takes for weights.
        """
        former, self._target = self._target, Target(config, model_path, need)
        for place in self._places.values():
            place.not_before = trio.current_time() + SETTLE_SECONDS
            if former is not None and former != self._target:
                self._retire(place, 0)
        self._changed.set()

    async def pause(self) -> None:
        """End all spares, and start none until `prepare`; returns when they are gone."""
        self._target = None
        spares = self._spares()
        for place in self._places.values():
            self._retire(place, 0)
        for spare in spares:
            await spare.gone.wait()

    def statistics(self) -> StandbyStatistics:
        """What is in the pool, as a frozen value."""
        spares = self._spares()
        prepared = sum(spare.prepared for spare in spares)
        pids = [spare.transport.pid for spare in spares if spare.transport is not None]
        known = tuple(pid for pid in pids if pid is not None)
        return StandbyStatistics(prepared, len(spares) - prepared, self._taken, self._lost, known)

    # --- the supervised child ------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Have spares wherever they are missing. Workers that were taken live on in this task."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                for place in self._places.values():
                    for spare in self._complete(place):
                        nursery.start_soon(self._keep, place, spare)
                with trio.move_on_at(self._next_look()):
                    await self._changed.wait()

    def _complete(self, place: Place) -> list[Spare]:
        """The spares that are missing, to be started now; those that are too many are retired."""
        target, now = self._target, trio.current_time()
        if target is None or now < place.not_before:
            return []
        self._retire(place, target.spares * max(1, place.serving))
        missing = max(0, target.spares * place.serving - len(place.spares))
        asked_for = target.config.standby_workers is not None
        if missing and not asked_for and self._memory() < target.need + MEMORY_RESERVE:
            log.debug("no memory for a standby worker", worker=place.spec.rank.name)
            place.not_before = now + MEMORY_SECONDS
            return []
        new = [Spare(target, now) for _ in range(missing)]
        place.spares += new
        return new

    def _next_look(self) -> float:
        now = trio.current_time()
        times = [place.not_before for place in self._places.values()]
        return min((time for time in times if time > now), default=math.inf)

    def _retire(self, place: Place, keep: int) -> None:
        """End spares, the newest first, until ``keep`` are left."""
        while len(place.spares) > keep:
            place.spares.pop().leave.cancel()

    def _spares(self) -> list[Spare]:
        return [spare for place in self._places.values() for spare in place.spares]

    # --- one spare -----------------------------------------------------------------------------------

    async def _keep(self, place: Place, spare: Spare) -> None:
        """Task: one spare, from its start to its end, whoever has it meanwhile."""
        target = spare.target
        try:
            async with self._open_transport(replace(place.spec, standby=True)) as transport:
                spare.transport = cast(SpareTransport, transport)
                try:
                    await self._hold(spare, Prepare(target.config, place.spec.rank, target.model_path))
                finally:
                    if spare.prepared and not spare.taken:  # else there is nothing to stop in order
                        with cleanup_scope(stop_budget.SPARE_WORKER):
                            await transport.stop(stop_budget.SPARE_WORKER)
        except Exception as error:  # whatever it was, it is no reason to disturb those who serve
            self._count_loss(place, spare, error)
        finally:
            if spare in place.spares:
                place.spares.remove(spare)
            spare.gone.set()
            self._changed.set()

    async def _hold(self, spare: Spare, prepare: Prepare) -> None:
        """Prepare a spare, and wait until it is taken and released, or retired.

        Raises:
            WorkerLost: it has died, or hangs.
        """
        transport = spare.transport
        assert transport is not None, "it was started"
        with spare.leave:
            await transport.send(prepare)
            with trio.move_on_after(PREPARE_SECONDS):
                await _wait_prepared(transport)
                spare.prepared = True
            if not spare.prepared:
                raise WorkerLost(transport.name, f"was not prepared within {PREPARE_SECONDS:g} s")
            log.debug("standby worker prepared", worker=transport.name, pid=transport.pid)
            while True:
                await transport.receive()  # raises when it dies
        if spare.taken:
            await spare.released.wait()

    def _count_loss(self, place: Place, spare: Spare, error: Exception) -> None:
        log.warning("standby worker lost", worker=place.spec.rank.name, cause=str(error))
        lived = trio.current_time() - spare.born
        place.losses = 1 if lived >= STEADY_SECONDS else place.losses + 1
        pause = min(BACKOFF_LIMIT, BACKOFF_SECONDS * 2 ** (place.losses - 1))
        place.not_before = trio.current_time() + pause
        self._lost += 1


async def _wait_prepared(transport: Transport) -> None:
    while not isinstance(message := await transport.receive(), Prepared):
        if isinstance(message, Failed):
            raise WorkerLost(transport.name, f"failed: {message.kind}: {message.message}")
