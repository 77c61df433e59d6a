"""One data-parallel replica: its workers, their scheduler, and how they are supervised."""

from __future__ import annotations

from ullm.actors.router import Router
from ullm.actors.scheduler import SchedulerActor
from ullm.actors.transports import OpenTransport
from ullm.actors.worker_group import WorkerGroup
from ullm.config import EngineConfig
from ullm.engine.status import ReplicaHealth
from ullm.faults import FaultInjector
from ullm.protocol import stop_budget
from ullm.supervision import ChildSpec, Restart, Strategy


class Replica:
    """The actors of one replica.

    Args:
        index: unique in the engine's life; a replica that replaces another one has a new index.
        slot: which of the engine's places it takes, with its devices and ports.

    Attributes:
        failure: why it was given up for good.
    """

    def __init__(
        self,
        index: int,
        slot: int,
        config: EngineConfig,
        router: Router,
        transport: OpenTransport,
        faults: FaultInjector,
    ) -> None:
        self.index = index
        self.slot = slot
        self.config = config
        self.group = WorkerGroup(index, slot, config, transport)
        self.scheduler = SchedulerActor(config, self.group, router, faults)
        self.failure: BaseException | None = None

    def spec(self) -> ChildSpec:
        """A scheduler is of no use without its workers, so their loss ends it too."""
        config = self.config
        # Their own budgets are wide: the engine's one deadline is what binds.
        budget = stop_budget.engine_seconds(config.shutdown_timeout)
        return ChildSpec.supervisor(
            f"replica{self.index}",
            [
                ChildSpec("workers", self.group.run, shutdown=budget, kill=self.group.kill),
                ChildSpec("scheduler", self.scheduler.run, shutdown=stop_budget.SCHEDULER),
            ],
            strategy=Strategy.REST_FOR_ONE,
            intensity=config.max_restarts,
            period=config.restart_period,
            restart=Restart.TEMPORARY,
        )

    def health(self, state: str) -> ReplicaHealth:
        """Where it is in its life."""
        age, seconds = self.group.round_trip() or (None, None)
        return ReplicaHealth(
            self.index, state == "up", self.group.epoch, self.group.pids, state, age, seconds
        )
