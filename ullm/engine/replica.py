"""One data-parallel replica: its workers, their scheduler, and how they are supervised."""

from __future__ import annotations

from ullm.actors.router import Router
from ullm.actors.scheduler import SchedulerActor
from ullm.actors.transports import OpenTransport
from ullm.actors.worker_group import WorkerGroup
from ullm.config import EngineConfig
from ullm.engine.status import ReplicaHealth
from ullm.faults import FaultInjector
from ullm.protocol import start_budget, stop_budget
from ullm.supervision import ChildSpec, Restart, Strategy, supervisor_child


class Replica:
    """The actors of one replica.

    Args:
        index: unique in the engine's life; a replica that takes the place of another one has a new index.
        slot: its place among the engine's replicas, with devices and ports of its own.
        config: as its workers are started with; a reload makes new replicas, and leaves this one as it is.

    Attributes:
        failure: why it was given up for good; None while it was not.
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
        """Return the child to supervise: a scheduler is of no use without its workers, and ends with them."""
        config = self.config
        # The budget is wide: what binds is the one deadline of the engine's stop.
        budget = stop_budget.engine_seconds(config.shutdown_timeout)
        return supervisor_child(
            f"replica{self.index}",
            [
                ChildSpec(
                    "workers",
                    self.group.run,
                    shutdown=budget,
                    kill=self.group.kill,
                    start_timeout=start_budget.worker_group_seconds(config.start_timeout),
                ),
                ChildSpec(
                    "scheduler",
                    self.scheduler.run,
                    shutdown=stop_budget.SCHEDULER,
                    start_timeout=start_budget.ACTOR,
                ),
            ],
            strategy=Strategy.REST_FOR_ONE,
            intensity=config.max_restarts,
            period=config.restart_period,
            restart=Restart.TEMPORARY,
        )

    def give_up(self, cause: BaseException) -> None:
        """Note that it failed beyond its limits, and will not run again."""
        self.failure = cause
        self.scheduler.give_up()

    def health(self, state: str, breaker: str) -> ReplicaHealth:
        """Return what the probes show of it.

        Args:
            state, breaker: see `ReplicaHealth`.
        """
        group = self.group
        age, seconds = group.round_trip() or (None, None)
        up, epoch = state == "up", group.incarnation
        role = self.config.role_of(self.slot)
        return ReplicaHealth(self.index, up, epoch, group.pids, state, age, seconds, breaker, role)
