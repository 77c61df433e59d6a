"""The start and the end of a supervisor's children: one at a time, or all that are left in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import trio

from ullm.supervision.children import Child, Incarnation
from ullm.supervision.roster import Roster
from ullm.supervision.shutdown import ChildReport
from ullm.supervision.termination import Terminator


class Launcher:
    """Start and end children of one supervisor; which and when is decided by `Control` and `Starts`.

    Args:
        roster: the children.
        terminator: the supervisor's.
        changed: called when a child is ready, has ended, or should have been ready by now.

    Attributes:
        nursery: where the children's tasks run; set by `Control` before the first start.
        closed: set when a stop was asked for; nothing begins after it.
    """

    nursery: trio.Nursery

    def __init__(
        self, roster: Roster, terminator: Terminator, changed: Callable[[Incarnation], None]
    ) -> None:
        self.closed = False
        self._roster = roster
        self._terminator = terminator
        self._changed = changed

    def begin(self, child: Child) -> None:
        """Start a child; `Control` hears when it is ready, declines, fails, or takes too long."""
        if self.closed:
            return
        incarnation = child.begin(self._changed)
        self.nursery.start_soon(incarnation.run, name=f"{self._roster.name}/{child.spec.child_id}")
        if math.isfinite(child.spec.start_timeout):
            self.nursery.start_soon(self._watch_start, incarnation)

    async def _watch_start(self, incarnation: Incarnation) -> None:
        with trio.move_on_after(incarnation.spec.start_timeout):
            await incarnation.settled.wait()
        if not incarnation.settled.is_set():
            incarnation.overdue = True
            self._changed(incarnation)

    async def end(
        self, children: Sequence[Child], later: float = 0.0, unlimited: int = 0
    ) -> list[ChildReport]:
        """End those of ``children`` that run, all at once, and report on them.

        Args:
            later: sum of the finite budgets of the children that will be ended afterwards.
            unlimited: how many of those have an infinite budget.
        """
        running = [child.incarnation for child in children if child.incarnation is not None]
        reports = await self._terminator.stop(running, later, unlimited)
        for child in children:
            child.stopped()
        return reports

    async def end_others(self, failed: Child) -> None:
        """End the children affected by a failed one in reverse order, and forget temporary ones."""
        for child in reversed(self._roster.affected_by(failed)):
            if child is failed:
                continue
            await trio.lowlevel.checkpoint_if_cancelled()
            await self.end([child])
            if child.temporary:  # it is not going to be started again
                self._roster.forget(child)

    async def end_all(self) -> tuple[ChildReport, ...]:
        """End all children in reverse order; those that are left at the deadline, all at once."""
        left = [child for child in self._roster if child.incarnation is not None]
        later = sum(child.spec.shutdown for child in left if math.isfinite(child.spec.shutdown))
        unlimited = sum(math.isinf(child.spec.shutdown) for child in left)
        earlier = self._terminator.abandoned()
        reports: list[ChildReport] = []
        while left and not self._roster.dynamic and trio.current_time() < self._terminator.deadline:
            child = left.pop()
            if math.isinf(child.spec.shutdown):
                unlimited -= 1
            else:
                later -= child.spec.shutdown
            reports += await self.end([child], later, unlimited)
        reports += await self.end(left[::-1])
        return (*reports, *earlier)
