"""The arithmetic of an orderly stop: one absolute deadline, budgets of stages, and the final report.

Everything here is a pure function of plain values; times are seconds on any one clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

INFINITY: Final = math.inf
"""A shutdown budget without a limit of its own; the deadline of the whole stop still holds."""
BRUTAL_KILL: Final = 0.0
"""No shutdown budget: cleanup is cancelled at its first await and the kill hook is called at once."""

SETTLE: Final = 0.05
"""Seconds that a child gets to unwind after its budget, before its kill hook is called."""
KILL_GRACE: Final = 0.25
"""Seconds that a child gets to end after its kill hook was called, before it counts as abandoned."""

Outcome = Literal["stopped", "killed", "abandoned", "failed"]

EXIT_OK: Final = 0
EXIT_START_FAILED: Final = 1
EXIT_FAILED: Final = 70
EXIT_ABANDONED: Final = 71
EXIT_SIGNAL_BASE: Final = 128


@dataclass(frozen=True, order=True)
class Deadline:
    """An absolute point in time by which something is over."""

    at: float

    @classmethod
    def after(cls, now: float, seconds: float) -> Deadline:
        """The deadline ``seconds`` from ``now``; ``INFINITY`` for none."""
        return cls(now + max(0.0, seconds))

    def remaining(self, now: float) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - now)

    def expired(self, now: float) -> bool:
        """Whether nothing is left."""
        return self.at <= now

    def tightened(self, other: Deadline) -> Deadline:
        """The earlier of two."""
        return min(self, other)

    def less_reserve(self, reserve: float, now: float) -> Deadline:
        """The deadline of an earlier stage that leaves ``reserve`` seconds for what comes after it.

        Never before ``now``: where the time left is shorter than the reserve, the stage gets none.
        """
        return Deadline(max(now, self.at - reserve))


def stage_budget(remaining: float, budget: float, later: float = 0.0, unlimited: int = 0) -> float:
    """Seconds that one stage of a stop may take, out of ``remaining``.

    Each stage gets its own budget as long as all of them fit. Otherwise what remains is divided in
    proportion, an infinite budget counting as all that remains. Computed anew as each stage begins, it
    passes on what earlier stages did not use.

    Args:
        later: sum of the finite budgets of the stages to come.
        unlimited: number of stages to come that have an infinite budget.
    """
    if remaining <= 0.0:
        return 0.0
    if math.isinf(remaining):
        return budget
    wanted = min(budget, remaining)
    total = wanted + max(0.0, later) + unlimited * remaining
    return wanted if total <= remaining else remaining * wanted / total


@dataclass(frozen=True)
class ChildReport:
    """How one child was stopped.

    Args:
        child_id: the child.
        outcome: ``stopped`` in time; ``killed``: it used up its budget, and ended after its kill hook;
            ``abandoned``: it runs still; ``failed``: it raised an exception.
        seconds: from the request to the end of the wait.
        detail: one line; empty where there is nothing to say.
        children: the reports of a supervisor's own children.
    """

    child_id: str
    outcome: Outcome
    seconds: float
    detail: str = ""
    children: tuple[ChildReport, ...] = ()

    def count(self, outcome: Outcome) -> int:
        """How many workers ended this way: this child, or those below it if it is a supervisor."""
        if not self.children:
            return int(self.outcome == outcome)
        return sum(child.count(outcome) for child in self.children)


@dataclass(frozen=True)
class StageReport:
    """One stage of a stop: ``drain``, ``abort``, or the id of a child.

    Args:
        outcome: ``done``, ``skipped`` or ``timeout`` for drain and abort; else as in `ChildReport`.
    """

    name: str
    seconds: float
    outcome: str = "done"


@dataclass(frozen=True)
class ShutdownReport:
    """What a stop did, for the last line of the log and for the exit code.

    Args:
        requested_by: ``SIGTERM``, ``admin``, ``shutdown()``, ``cancelled``, ``failure``, …
        drained: requests that ended by themselves after the stop was asked for.
        aborted: requests that were ended early.
        killed: children that used up their budget and were ended by force.
        abandoned: children that could not be ended.
        stages: in order.
        seconds: from the request to the end.
        started: False if the stop was due to a failure to start.
        failure: in one line, why the engine failed beyond its restart limits; None if it did not.
        forced_by: number of the signal that cut the stop short.
    """

    requested_by: str
    drained: int = 0
    aborted: int = 0
    killed: int = 0
    abandoned: int = 0
    stages: tuple[StageReport, ...] = ()
    seconds: float = 0.0
    started: bool = True
    failure: str | None = None
    forced_by: int | None = None

    @property
    def exit_code(self) -> int:
        """0 in order, 1 could not start, 70 failed, 71 left something behind, 128+N forced by signal N."""
        if self.forced_by is not None:
            return EXIT_SIGNAL_BASE + self.forced_by
        if not self.started:
            return EXIT_START_FAILED
        if self.failure is not None:
            return EXIT_FAILED
        return EXIT_ABANDONED if self.abandoned else EXIT_OK

    def __str__(self) -> str:
        """One line: who asked, what became of requests and children, how long each stage took."""
        counts = ", ".join(
            f"{getattr(self, name)} {name}" for name in ("drained", "aborted", "killed", "abandoned")
        )
        stages = ", ".join(f"{stage.name} {stage.seconds:.2f} s {stage.outcome}" for stage in self.stages)
        parts = [f"stopped in {self.seconds:.2f} s by {self.requested_by}: {counts}"]
        parts += [stages] if stages else []
        parts += [f"failure: {self.failure}"] if self.failure is not None else []
        return "; ".join([*parts, f"exit code {self.exit_code}"])


def stages_of(reports: Sequence[ChildReport]) -> tuple[StageReport, ...]:
    """The children's part of `ShutdownReport.stages`."""
    return tuple(StageReport(report.child_id, report.seconds, report.outcome) for report in reports)
