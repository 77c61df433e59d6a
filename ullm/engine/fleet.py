"""The replicas of an engine: how they start, pause, stop, and are replaced."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from ullm.actors.router import Router
from ullm.actors.standby_pool import StandbyPool, StandbyStatistics
from ullm.actors.transports import OpenTransport
from ullm.config import EngineConfig
from ullm.engine.replica import Replica
from ullm.engine.status import ReplicaHealth
from ullm.errors import StartFailed, WorkerLost, first_cause
from ullm.faults import FaultInjector
from ullm.logs import get_logger
from ullm.machine import resident_memory
from ullm.protocol import stop_budget
from ullm.supervision import ChildSpec, Kind, Restart, Supervisor

log = get_logger("ullm.engine.fleet")

STDERR_LINES = 5
"""Of a lost worker's last words in the log."""


class Fleet:
    """See the module.

    Args:
        transport: how to start workers.
        on_failure: called with the cause when the last replica is given up.
        faults: what shall go wrong.
        standby: where ``transport`` takes spare workers from; None: it has none.
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
        self.config = config
        self.replicas: list[Replica] = []
        self.former_restarts = 0
        self._router = router
        self._transport = transport
        self._on_failure = on_failure
        self._faults = faults
        self._standby = standby
        self._root: Supervisor | None = None
        self._made = 0
        self.replicas = [self._make(slot, config) for slot in range(config.replicas)]

    def _make(self, slot: int, config: EngineConfig) -> Replica:
        self._made += 1
        return Replica(self._made - 1, slot, config, self._router, self._transport, self._faults)

    # --- starting and stopping --------------------------------------------------------------------------

    def specs(self, model_path: str) -> list[ChildSpec]:
        """The children that the engine starts with."""
        for replica in self.replicas:
            replica.group.model_path = model_path
        spares = [] if self._standby is None else [ChildSpec("standby", self._standby.run, shutdown=stop_budget.STANDBY_POOL)]
        return [*spares, *(self._spec(replica) for replica in self.replicas)]

    def supervised_by(self, root: Supervisor) -> None:
        """The supervisor that `specs` were given to."""
        self._root = root

    async def wait_up(self) -> None:
        """Wait until all replicas take requests, but those that were given up."""
        while not all(self._is_settled(replica) for replica in self.replicas):
            await self._router.wait_changed()
        self._prepare_spares()

    def _prepare_spares(self) -> None:
        """Those who serve are up: now it is time for those who may take their places."""
        replica = next((replica for replica in self.replicas if replica.group.info is not None), None)
        if self._standby is None or replica is None or replica.group.info is None:
            return
        need = replica.group.info.weight_bytes if replica.group.info.device == "cpu" else 0
        self._standby.prepare(replica.config, replica.group.model_path, need)

    def spares(self) -> StandbyStatistics:
        """Of the standby workers."""
        return StandbyStatistics() if self._standby is None else self._standby.statistics()

    async def _drop_spares(self) -> None:
        """What they hold is to be given back, too."""
        if self._standby is not None:
            await self._standby.pause()

    def _is_settled(self, replica: Replica) -> bool:
        return replica.failure is not None or replica.index in self._router.replicas_up

    async def start_all(self) -> None:
        """Start replicas that were stopped; return when they take requests.

        Raises:
            StartFailed: one could not be started.
        """
        for replica in self.replicas:
            replica.group.restarts -= 1  # this one was asked for
            replica.scheduler.resume()  # it may have been paused before
            await self._start_persistently(replica)
        await self.wait_up()

    async def stop_all(self) -> int:
        """Stop all replicas in order; their requests wait.

        Returns:
            Bytes of memory that their processes had, as far as the system tells.
        """
        await self._drop_spares()
        had = sum(resident_memory(pid) for replica in self.replicas for pid in replica.group.pids)
        for replica in self.replicas:
            await self._stop(replica)
        return had

    @property
    def given_up(self) -> bool:
        """Whether no replica is left."""
        return all(replica.failure is not None for replica in self.replicas)

    def kill(self) -> None:
        """End all workers now."""
        for replica in self.replicas:
            replica.group.kill()

    # --- resting --------------------------------------------------------------------------------------------

    async def pause(self, level: int) -> int:
        """Have all schedulers pause and, from level 1, their workers sleep.

        Returns:
            Bytes given back.
        """
        if level:
            await self._drop_spares()
        pauses = [replica.scheduler.pause(level) for replica in self.replicas if replica.failure is None]
        for pause in pauses:
            await pause.reached.wait()
        return sum(pause.given_back for pause in pauses)

    async def resume(self) -> None:
        """End `pause`; return when all replicas take requests."""
        for replica in self.replicas:
            replica.scheduler.resume()
        await self.wait_up()

    # --- replacing ------------------------------------------------------------------------------------------

    async def replace(self, config: EngineConfig, model_path: str, *, swap: bool, patience: float) -> int:
        """Start new replicas, one after the other, each before the one in its place is stopped.

        Args:
            swap: the memory does not hold both: the old one sleeps while the new one starts. Its requests
                wait, and go on with the new one.
            patience: seconds for requests to end on the old replica before they are moved.

        Returns:
            Requests that were moved.

        Raises:
            StartFailed: the new one did not come up; the old one serves on.
        """
        moved = 0
        for place, old in enumerate(self.replicas):
            new = self._make(old.slot, config)
            new.group.model_path = model_path
            new.group.epoch = old.group.epoch
            await self._start_beside(old, new, swap=swap)
            self.replicas[place] = new
            moved += await self._retire(old, patience)
        self.config = config
        self._prepare_spares()
        return moved

    async def _start_beside(self, old: Replica, new: Replica, *, swap: bool) -> None:
        if swap:
            await old.scheduler.pause(1).reached.wait()
        try:
            await self._start(new)
            while not self._is_settled(new):
                await self._router.wait_changed()
        except StartFailed:
            old.group.epoch = max(old.group.epoch, new.group.epoch)
            if swap:
                old.scheduler.resume()
            raise

    async def _retire(self, old: Replica, patience: float) -> int:
        self._router.retire(old.index)
        with trio.move_on_after(patience):
            while self._router.load(old.index):
                await self._router.wait_changed()
        moved = self._router.load(old.index)
        if old.failure is None:
            await old.scheduler.pause(0).reached.wait()  # the step in flight ends, or is known to hang
        await self._stop(old)
        self.former_restarts += max(0, old.group.restarts)
        return moved

    # --- one replica ----------------------------------------------------------------------------------------

    async def _start(self, replica: Replica) -> None:
        assert self._root is not None, "the tree is started before replicas are"
        await self._root.start_child(self._spec(replica))

    async def _start_persistently(self, replica: Replica) -> None:
        """As `_start`, and again, as often as those in service would be: memory may be short for a moment."""
        for left in reversed(range(self.config.max_restarts + 1)):
            try:
                return await self._start(replica)
            except StartFailed as error:
                if not left:
                    raise
                log.warning("start failed; once more", replica=replica.index, cause=str(first_cause(error)))

    async def _stop(self, replica: Replica) -> None:
        assert self._root is not None, "the tree is started before replicas are"
        if replica.failure is None:
            await self._root.terminate_child(f"replica{replica.index}")

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
        """A replica that failed beyond its limits stays down; with the last one, the engine ends."""
        status = _Noted(task_status)
        try:
            await supervise(task_status=status)
        except Exception as error:
            if not status.started_once:
                raise
            replica.failure = error
            replica.scheduler.give_up()
            self._router.announce_change()
            _log_failure(replica, first_cause(error))
            if self.given_up:
                self._on_failure(first_cause(error))

    # --- what is inside -------------------------------------------------------------------------------------

    def health(self, *, starting: bool, sleep: str) -> list[ReplicaHealth]:
        """Of each replica.

        Args:
            starting: the engine has not been up yet.
            sleep: state of the engine's sleep.
        """
        return [replica.health(self._state(replica, starting, sleep)) for replica in self.replicas]

    def _state(self, replica: Replica, starting: bool, sleep: str) -> str:
        if replica.failure is not None:
            return "failed"
        if sleep != "awake":
            return sleep
        if replica.index in self._router.replicas_up:
            return "up"
        return "starting" if starting else "restarting"

    @property
    def restarts(self) -> int:
        """Of worker groups, since the engine's start."""
        return self.former_restarts + sum(max(0, replica.group.restarts) for replica in self.replicas)


def _log_failure(replica: Replica, cause: BaseException) -> None:
    """The root cause, once, with the last that was heard of a worker."""
    tail = cause.stderr_tail[-STDERR_LINES:] if isinstance(cause, WorkerLost) else ()
    last_words = {"stderr": " | ".join(tail)} if tail else {}
    log.error("replica failed for good", replica=replica.index, cause=str(cause), **last_words)


class _Noted:
    """A task status that remembers whether it was told."""

    def __init__(self, status: trio.TaskStatus[Any]) -> None:
        self._status = status
        self.started_once = False

    def started(self, value: Any = None) -> None:
        self.started_once = True
        self._status.started(value)
