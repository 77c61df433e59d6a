"""One data-parallel replica: its workers, their scheduler, and how they are supervised."""

from __future__ import annotations

from ullm.actors.group import WorkerGroup
from ullm.actors.router import Router
from ullm.actors.scheduler import SchedulerActor
from ullm.actors.transports import OpenTransport
from ullm.config import EngineConfig
from ullm.health import ReplicaHealth
from ullm.supervision import ChildSpec, Restart, Strategy

TEARDOWN_RESERVE = 3.0
"""Seconds of the shutdown timeout kept for ending requests and stopping children in order."""


class Replica:
    """The actors of one replica."""

    def __init__(self, index: int, config: EngineConfig, router: Router, transport: OpenTransport) -> None:
        self.index = index
        self.group = WorkerGroup(index, config, transport)
        self.scheduler = SchedulerActor(config, self.group, router)

    def spec(self, config: EngineConfig) -> ChildSpec:
        """A scheduler is of no use without its workers, so their loss ends it too."""
        # Their own budgets are wide: the engine's one deadline is what binds.
        budget = max(config.shutdown_timeout, TEARDOWN_RESERVE)
        return ChildSpec.supervisor(
            f"replica{self.index}",
            [
                ChildSpec("workers", self.group.run, shutdown=budget, kill=self.group.kill),
                ChildSpec("scheduler", self.scheduler.run, shutdown=1.0),
            ],
            strategy=Strategy.REST_FOR_ONE,
            intensity=config.max_restarts,
            period=config.restart_period,
            restart=Restart.TEMPORARY,
        )

    def health(self, *, up: bool) -> ReplicaHealth:
        """Where it is in its life; ``up``: whether the router gives it requests."""
        return ReplicaHealth(self.index, up, self.group.epoch, self.group.pids)
