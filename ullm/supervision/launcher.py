"""The start and the end of a supervisor's children: one at a time, or all that are left in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import trio

from ullm.supervision.children import Child, Incarnation
from ullm.supervision.errors import StartFailed
from ullm.supervision.roster import Roster
from ullm.supervision.shutdown import ChildReport
from ullm.supervision.spec import ChildStatus
from ullm.supervision.termination import Terminator


class Launcher:
    """Start and end children of one supervisor; which and when is decided by `Control`.

    Args:
        roster: the children.
        terminator: the supervisor's.
        ended: called when a child's task has ended.

    Attributes:
        nursery: where the children's tasks run; set by `Control` before the first start.
    """

    nursery: trio.Nursery

    def __init__(self, roster: Roster, terminator: Terminator, ended: Callable[[Incarnation], None]) -> None:
        self._roster = roster
        self._terminator = terminator
        self._ended = ended

    async def start(self, child: Child) -> None:
        """Start a child and wait until it is ready, declines, or fails.

        Raises:
            StartFailed: it failed; the child is left stopped.
        """
        await trio.lowlevel.checkpoint_if_cancelled()  # a stop may have come while siblings were ended
        incarnation = child.begin(self._ended)
        self.nursery.start_soon(incarnation.run, name=f"{self._roster.name}/{child.spec.child_id}")
        await incarnation.settled.wait()
        if not incarnation.ready:
            child.stopped()
            raise_fatal(incarnation)
            if not incarnation.scope.cancel_called:  # else terminate_child did not let it become ready
                raise StartFailed(child.spec.child_id, incarnation.cause()) from incarnation.error
        elif incarnation.declined:
            await self.end([child])
        else:
            child.status = ChildStatus.RUNNING

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


def raise_fatal(incarnation: Incarnation) -> None:
    """Raise a child's KeyboardInterrupt or SystemExit, which stop the whole tree in order."""
    if incarnation.error is not None and not isinstance(incarnation.error, Exception):
        raise incarnation.error
