"""The end of children: ask them, wait for their budget, use force, wait a moment, abandon them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import trio

from ullm.supervision.children import Incarnation
from ullm.supervision.errors import describe
from ullm.supervision.hooks import call_hook
from ullm.supervision.shutdown import (
    BRUTAL_KILL,
    KILL_GRACE,
    SETTLE,
    ChildOutcome,
    ChildReport,
    stage_budget,
)
from ullm.supervision.spec import Kind

log = logging.getLogger("ullm.supervision")


class _Stop:
    """The stop of one incarnation.

    Attributes:
        stop_by: end of its budget, in trio's time.
        patience: seconds between the end of its budget and the use of force.
    """

    def __init__(self, incarnation: Incarnation, budget: float, patience: float) -> None:
        self.incarnation = incarnation
        self.began = trio.current_time()
        self.stop_by = self.began + budget
        self.patience = 0.0 if incarnation.spec.shutdown == BRUTAL_KILL else patience
        self.killed_at: float | None = None
        self.ended_at = self.began
        self.detail = ""

    @property
    def is_supervisor(self) -> bool:
        """Whether it is a supervisor, which bounds its own stop: it is waited for and never abandoned."""
        return self.incarnation.spec.kind is Kind.SUPERVISOR

    def ask(self) -> None:
        """Cancel the child; the deadline for its cleanup is set before it notices."""
        self.incarnation.lifetime.tighten(self.stop_by)
        self.incarnation.scope.cancel()

    def tighten(self, stop_by: float, patience: float) -> None:
        """Move the end of the budget to an earlier time."""
        self.stop_by = min(self.stop_by, stop_by)
        self.patience = min(self.patience, patience)
        self.incarnation.lifetime.tighten(self.stop_by)

    def kill_due(self) -> float:
        """Return the time to use force."""
        return self.stop_by + self.patience

    def abandon_due(self) -> float:
        """Return the time to give up."""
        if self.killed_at is None or self.is_supervisor:
            return math.inf
        return self.killed_at + KILL_GRACE

    def kill(self, supervisor: str) -> None:
        """Use force: end a supervisor's deadline now, call the kill hook of any other child."""
        self.killed_at = trio.current_time()
        spec = self.incarnation.spec
        self.incarnation.lifetime.tighten(-math.inf)
        if spec.kill is None:
            return
        try:
            spec.kill()
        except Exception as error:
            self.detail = f"kill hook raised {describe(error)}"
            log.exception(
                "kill hook failed  supervisor=%(supervisor)s child=%(child)s cause=%(cause)s",
                {"supervisor": supervisor, "child": spec.child_id, "cause": describe(error)},
            )

    def report(self) -> ChildReport:
        """Return how it ended."""
        incarnation = self.incarnation
        children = getattr(incarnation.value, "reports", ()) if self.is_supervisor else ()
        if incarnation.error is not None:
            self.detail = describe(incarnation.error)
        return ChildReport(
            incarnation.spec.child_id, self._outcome(), self.ended_at - self.began, self.detail, children
        )

    def _outcome(self) -> ChildOutcome:
        if not self.incarnation.done.is_set():
            return "abandoned"
        if self.killed_at is not None:
            return "killed"
        return "failed" if self.incarnation.error is not None else "stopped"


class Terminator:
    """The means to end children within their budgets and within one deadline, which may move meanwhile.

    Args:
        on_abandoned: called with the report of each child that could not be ended.
    """

    def __init__(self, name: str, on_abandoned: Callable[[ChildReport], None] | None) -> None:
        self.name = name
        self.deadline = math.inf
        self._on_abandoned = on_abandoned
        self._stops: list[_Stop] = []
        self._later = (0.0, 0)
        self._waiting: trio.CancelScope | None = None
        self._abandoned: list[tuple[Incarnation, ChildReport]] = []

    def abandoned(self) -> tuple[ChildReport, ...]:
        """Return the reports of children that were abandoned and still run."""
        return tuple(report for incarnation, report in self._abandoned if not incarnation.done.is_set())

    def expedite(self, deadline: float) -> None:
        """Move the deadline to an earlier time; ``-math.inf`` uses force at once."""
        if deadline >= self.deadline:
            return
        self.deadline = deadline
        now = trio.current_time()
        for stop in self._stops:
            stop.tighten(now + self._budget(stop.incarnation), self._patience())
        if self._waiting is not None:
            self._waiting.cancel()

    async def stop(
        self, incarnations: Sequence[Incarnation], later: float = 0.0, unlimited: int = 0
    ) -> list[ChildReport]:
        """End these children at the same time; return when each has ended or is given up.

        Shielded from cancellation: it is bounded by budgets and deadline instead.

        Args:
            later: sum of the finite budgets of the children that will be stopped afterwards.
            unlimited: how many of those have an infinite budget.
        """
        self._later = (later, unlimited)
        self._stops = []
        for incarnation in incarnations:
            stop = _Stop(incarnation, self._budget(incarnation), self._patience())
            self._stops.append(stop)
            stop.ask()
        for stop in sorted(self._stops, key=_Stop.kill_due):
            if not await self._wait(stop, stop.kill_due):
                self._use_force(stop)
        for stop in self._stops:
            if not await self._wait(stop, stop.abandon_due):
                self._give_up(stop)
        stops, self._stops = self._stops, []
        return [stop.report() for stop in stops]

    def _budget(self, incarnation: Incarnation) -> float:
        return stage_budget(self.deadline - trio.current_time(), incarnation.spec.shutdown, *self._later)

    def _patience(self) -> float:
        return 0.0 if self.deadline == -math.inf else SETTLE

    async def _wait(self, stop: _Stop, limit: Callable[[], float]) -> bool:
        """Wait for the child's end until ``limit()``, which may move; return whether it has ended."""
        done = stop.incarnation.done
        if done.is_set():
            return True
        while not done.is_set() and trio.current_time() < limit():
            with trio.CancelScope(deadline=limit(), shield=True) as self._waiting:
                await done.wait()
        self._waiting = None
        if not done.is_set() and (stop.patience or stop.killed_at is not None):
            # The time may have passed while the event loop was busy: let every task that can run do so once.
            # That takes two turns, because trio shuffles the order of tasks within one.
            await trio.lowlevel.cancel_shielded_checkpoint()
            await trio.lowlevel.cancel_shielded_checkpoint()
        stop.ended_at = trio.current_time()
        return done.is_set()

    def _use_force(self, stop: _Stop) -> None:
        log.warning(
            "child used up its shutdown budget  supervisor=%(supervisor)s child=%(child)s",
            {"supervisor": self.name, "child": stop.incarnation.spec.child_id},
        )
        stop.kill(self.name)

    def _give_up(self, stop: _Stop) -> None:
        ignored = "cancellation" if stop.incarnation.spec.kill is None else "cancellation and its kill hook"
        stop.detail = stop.detail or f"ignored {ignored}"
        report = stop.report()
        self._abandoned.append((stop.incarnation, report))
        log.error(
            "child abandoned  supervisor=%(supervisor)s child=%(child)s detail=%(detail)s",
            {"supervisor": self.name, "child": report.child_id, "detail": report.detail},
        )
        call_hook("on_abandoned", self._on_abandoned, report, supervisor=self.name, child=report.child_id)
