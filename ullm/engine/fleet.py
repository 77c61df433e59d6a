"""The replicas of an engine: how they start, pause and stop, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import trio

from ullm.actors.router import Router
from ullm.actors.standby_pool import StandbyPool, StandbyStatistics
from ullm.actors.transports import OpenTransport
from ullm.config import EngineConfig, Tuning
from ullm.engine.replica import Replica
from ullm.errors import AdapterUnusable, ChildNotFound, StartFailed, WorkerLost, first_cause
from ullm.faults import FaultInjector
from ullm.hub import LocalModel
from ullm.hub.tuning import read_tuning
from ullm.logs import get_logger
from ullm.machine import resident_memory
from ullm.protocol import start_budget, stop_budget
from ullm.protocol.messages import Adapter
from ullm.supervision import ChildSpec, Kind, Restart, Supervisor

log = get_logger(__name__)

STDERR_LINES = 5
"""Lines of a lost worker's stderr that go to the log."""


class Fleet:
    """Every change of an engine's replicas, of all at once or of one; hence some more than 20 short methods.

    Args:
        config: how many replicas, and what they are first started with.
        transport: starts workers.
        on_failure: called with the cause when the last replica is given up.
        faults: faults to inject.
        standby: where ``transport`` takes standby workers from, if it does.

    Attributes:
        replicas: one for each slot.
        tuning: how all CPU workers divide products, in every replica, after restarts and reloads.
        former_restarts: worker restarts of replicas that were retired.
    """

    def __init__(
        self,
        config: EngineConfig,
        router: Router,
        transport: OpenTransport,
        on_failure: Callable[[BaseException], None],
        faults: FaultInjector,
        standby: StandbyPool | None = None,
    ) -> None:
        self.former_restarts = 0
        self.tuning = Tuning()
        self._config = config
        self._router = router
        self._transport = transport
        self._on_failure = on_failure
        self._faults = faults
        self._standby = standby
        self._root: Supervisor | None = None
        self._made = 0
        self.replicas = [self.make(slot, config) for slot in range(config.replicas)]

    def make(self, slot: int, config: EngineConfig) -> Replica:
        """Make a replica, which neither runs yet nor is one of `replicas`."""
        self._made += 1
        return Replica(self._made - 1, slot, config, self._router, self._transport, self._faults)

    # --- the whole fleet --------------------------------------------------------------------------------

    def specs(self, local: LocalModel) -> list[ChildSpec]:
        """Return the children that the engine starts with; see `supervised_by`.

        Args:
            local: the files of the model that they load.
        """
        model_path = str(local.path)
        if self._config.calibrates_kernels:
            self.tuning = read_tuning(self._config, model_path) or Tuning()
        for replica in self.replicas:
            replica.group.load_from(model_path, self.tuning, str(local.tokenizer_path))
        standbys = []
        if self._standby is not None:
            standbys = [
                ChildSpec(
                    "standby",
                    self._standby.run,
                    shutdown=stop_budget.STANDBY_POOL,
                    start_timeout=start_budget.ACTOR,
                )
            ]
        return [*standbys, *(self._spec(replica) for replica in self.replicas)]

    def supervised_by(self, root: Supervisor) -> None:
        """Note the supervisor that `specs` are given to."""
        self._root = root

    async def wait_up(self) -> None:
        """Wait until all replicas take requests, except those that were given up."""
        while not all(map(self._is_settled, self.replicas)):
            await self._router.wait_changed()
        self.prepare_standbys()

    async def start_all(self) -> None:
        """Start replicas that were stopped; return when they take requests.

        Raises:
            StartFailed: one could not be started.
        """
        for replica in self.replicas:
            replica.group.expect_start()
            replica.scheduler.resume()  # it may have been paused before
            await self._start_persistently(replica)
        await self.wait_up()

    async def stop_all(self) -> int:
        """Stop all replicas in order; their requests wait.

        Returns:
            Bytes of memory that their processes had, as far as the system tells.
        """
        await self._drop_standbys()
        resident = sum(resident_memory(pid) for replica in self.replicas for pid in replica.group.pids)
        for replica in self.replicas:
            await self.stop(replica)
        return resident

    async def pause(self, level: int) -> int:
        """Pause all schedulers and, from level 1, put their workers to sleep.

        Returns:
            Bytes given back.
        """
        if level:
            await self._drop_standbys()
        pauses = [replica.scheduler.pause(level) for replica in self.replicas if replica.failure is None]
        for pause in pauses:
            await pause.reached.wait()
        return sum(pause.given_back for pause in pauses)

    async def resume(self) -> None:
        """End `pause`; return when all replicas take requests."""
        for replica in self.replicas:
            replica.scheduler.resume()
        await self.wait_up()

    async def keep_adapter(
        self, adapter: Adapter, replicas: Iterable[Replica] | None = None, *, wanted: bool = True
    ) -> None:
        """Have the workers load an adapter, or drop it; those that are restarted meanwhile are asked again.

        Args:
            replicas: default: all; they are awake.

        Raises:
            AdapterUnusable: it cannot be loaded, or workers were lost with it twice.
        """
        for replica in self.replicas if replicas is None else replicas:
            error, losses = None, 0
            while error is None and replica.failure is None:
                if not (self._is_settled(replica) and replica.group.ready):
                    await self._router.wait_changed()
                    continue
                try:
                    error = await replica.group.keep_adapter(adapter, wanted=wanted)
                except WorkerLost as loss:
                    losses += 1
                    error = str(loss) if losses > 1 else None
            if error and wanted:
                raise AdapterUnusable(f"adapter {adapter.name!r}: {error}")

    def kill(self) -> None:
        """End all workers now."""
        for replica in self.replicas:
            replica.group.kill()

    @property
    def given_up(self) -> bool:
        """Whether no replica is left."""
        return all(replica.failure is not None for replica in self.replicas)

    @property
    def restarts(self) -> int:
        """Restarts of worker groups since the engine's start."""
        return self.former_restarts + sum(replica.group.restarts for replica in self.replicas)

    # --- standby workers ----------------------------------------------------------------------------------

    def prepare_standbys(self) -> None:
        """Prepare standby workers for the present model: the workers that serve are up."""
        replica = next((replica for replica in self.replicas if replica.group.info is not None), None)
        if self._standby is None or replica is None or replica.group.info is None:
            return
        need = replica.group.info.weight_bytes if replica.group.info.device == "cpu" else 0
        self._standby.prepare(replica.config, replica.group.model_path, need)

    def standbys(self) -> StandbyStatistics:
        """Return the counts of standby workers."""
        return StandbyStatistics() if self._standby is None else self._standby.statistics()

    async def _drop_standbys(self) -> None:
        """End standby workers, so that their memory is given back, too."""
        if self._standby is not None:
            await self._standby.pause()

    # --- one replica ----------------------------------------------------------------------------------------

    async def start(self, replica: Replica) -> None:
        """Start a replica; return when its scheduler has started.

        Raises:
            StartFailed: it could not be started.
        """
        assert self._root is not None, "the tree is started before replicas are"
        await self._root.start_child(self._spec(replica))

    async def wait_settled(self, replica: Replica) -> None:
        """Wait until a replica takes requests, or has been given up."""
        while not self._is_settled(replica):
            await self._router.wait_changed()

    def _is_settled(self, replica: Replica) -> bool:
        return replica.failure is not None or replica.index in self._router.replicas_up

    async def stop(self, replica: Replica) -> None:
        """Stop a replica in order, after the KV that is on its way from there."""
        assert self._root is not None, "the tree is started before replicas are"
        if replica.failure is None:
            await self._router.settle(replica.index)
            await self._root.terminate_child(f"replica{replica.index}")

    async def stop_if_started(self, replica: Replica) -> None:
        """Stop a replica in order, if it was started."""
        with suppress(ChildNotFound):
            await self.stop(replica)

    async def _start_persistently(self, replica: Replica) -> None:
        """`start`, tried as often as a replica in service is restarted: memory may be short for a moment."""
        for left in reversed(range(replica.config.max_restarts + 1)):
            try:
                return await self.start(replica)
            except StartFailed as error:
                if not left:
                    raise
                log.warning("start failed, retrying", replica=replica.index, cause=str(first_cause(error)))

    def _spec(self, replica: Replica) -> ChildSpec:
        spec = replica.spec()
        return ChildSpec(
            spec.child_id,
            partial(self._run, replica, spec.run),
            restart=Restart.TEMPORARY,
            shutdown=spec.shutdown,
            kind=Kind.SUPERVISOR,
        )

    async def _run(
        self, replica: Replica, supervise: Callable[..., Any], *, task_status: trio.TaskStatus[Any]
    ) -> None:
        """Run a replica; one that fails beyond its limits stays down, and the last one ends the engine."""
        status = _StartedOnce(task_status)
        try:
            await supervise(task_status=status)
        except Exception as error:
            if not status.started_once:
                raise
            replica.give_up(error)
            self._router.announce_change()
            _log_failure(replica, first_cause(error))
            if self.given_up:
                self._on_failure(first_cause(error))


def _log_failure(replica: Replica, cause: BaseException) -> None:
    """Log the root cause, once, with the end of the lost worker's stderr."""
    tail = cause.stderr_tail[-STDERR_LINES:] if isinstance(cause, WorkerLost) else ()
    stderr = {"stderr": " | ".join(tail)} if tail else {}
    log.error("replica failed for good", replica=replica.index, cause=str(cause), **stderr)


class _StartedOnce:
    """A task status that remembers whether ``started`` was called."""

    def __init__(self, status: trio.TaskStatus[Any]) -> None:
        self._status = status
        self.started_once = False

    def started(self, value: Any = None) -> None:
        self.started_once = True
        self._status.started(value)
