"""The arithmetic of an orderly stop: budgets within one deadline, and a report of how each child ended.

Everything here is a pure function of plain values; times are seconds on any one clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

INFINITY: Final = math.inf
"""A shutdown budget without a limit of its own; the deadline of the whole stop still holds."""
BRUTAL_KILL: Final = 0.0
"""No shutdown budget: cleanup is cancelled at its first await, and the kill hook is called at once."""

SETTLE: Final = 0.05
"""Seconds that a child gets to unwind after its budget, before its kill hook is called."""
KILL_GRACE: Final = 0.25
"""Seconds that a child gets to end after its kill hook was called, before it counts as abandoned."""

ChildOutcome = Literal["stopped", "killed", "abandoned", "failed"]

EXIT_ABANDONED: Final = 71
"""Exit code of a process that leaves something running behind."""
EXIT_SIGNAL_BASE: Final = 128
"""Exit code of a process that a signal forced to leave, less the signal's number."""


def stage_budget(remaining: float, budget: float, later: float = 0.0, unlimited: int = 0) -> float:
    """Return the seconds that one stage of a stop may take, out of ``remaining``.

    Each stage gets its own budget as long as all of them fit. Otherwise what remains is divided in
    proportion, an infinite budget counting as all that remains. Computed anew as each stage begins, this
    passes on what earlier stages did not use.

    Args:
        remaining: seconds until the deadline of the whole stop; infinite for none.
        budget: seconds that this stage would like.
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
    """The stop of one child.

    Args:
        child_id: the child.
        outcome: ``stopped`` in time; ``killed``: it used up its budget, and ended after its kill hook;
            ``abandoned``: it still runs; ``failed``: it raised an exception.
        seconds: from the request to the end of the wait.
        detail: one line; empty if there is nothing to say.
        children: the reports of a supervisor's own children.
    """

    child_id: str
    outcome: ChildOutcome
    seconds: float
    detail: str = ""
    children: tuple[ChildReport, ...] = ()

    def count(self, outcome: ChildOutcome) -> int:
        """Return how many workers ended this way: this child, or those below it if it is a supervisor."""
        if not self.children:
            return int(self.outcome == outcome)
        return sum(child.count(outcome) for child in self.children)
