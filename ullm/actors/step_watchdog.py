"""Which answers a worker owes, since when, and how long they may take."""

from __future__ import annotations

import trio

LOOK_SECONDS = 0.5
"""Interval at which a rank that owes an answer is checked for suspension."""

LATE_SECONDS = 0.2
"""How long an overdue answer may still be read before its worker is given up."""

FROZEN_SECONDS = 2.0
"""How late this process may notice a time that has come. Later than that, it was itself suspended, as in a
frozen control group, and its workers with it: what they owe is due as much later."""

SUSPENDED_SECONDS = 1.0
"""How long a rank may be suspended, by SIGSTOP, before it is given up."""


class StepWatchdog:
    """The answers that one rank owes, and the deadline of its next sign of life.

    Args:
        patience: seconds from one sign of life to the next.
    """

    def __init__(self, patience: float) -> None:
        self.scope = trio.CancelScope()
        self._patience = patience
        self._owed: dict[object, float] = {}
        self._thawed = False

    def renewed(self) -> trio.CancelScope:
        """Return the scope to wait in, which is cancelled when a sign of life is overdue; then a new one."""
        if self.scope.cancel_called:
            self.scope = trio.CancelScope(deadline=trio.current_time() + self._patience)
        return self.scope

    def owe(self, answer: object) -> None:
        """Expect an answer from now on; the first one starts the clock."""
        if not self._owed:
            self.extend(self._patience)
        self._owed[answer] = trio.current_time()

    def settle(self, answer: object) -> float | None:
        """Note that an answer has come; return since when it was owed, or None if it is not owed."""
        since = self._owed.pop(answer, None)
        if since is not None:
            self.extend(self._patience if self._owed else float("inf"))
        return since

    def skipped(self, step_id: int) -> int | None:
        """Return the step whose result must come before that of ``step_id``; None if there is none."""
        steps = [owed[1] for owed in self._owed if isinstance(owed, tuple) and owed[0] == "step"]
        return steps[0] if step_id in steps[1:] else None

    def extend(self, seconds: float) -> None:
        """Note a sign of life; the next one is due in ``seconds``."""
        self._thawed = False
        self.scope.deadline = trio.current_time() + seconds

    def thawed(self) -> None:
        """Note that this process was suspended until now: the worker has all its time again."""
        self._thawed = self.scope.cancel_called
        self.scope.deadline = max(self.scope.deadline, trio.current_time() + self._patience)

    def excused(self) -> bool:
        """Return whether this process was suspended before the deadline that has passed."""
        thawed, self._thawed = self._thawed, False
        return thawed

    @property
    def is_idle(self) -> bool:
        """Whether nothing is owed."""
        return not self._owed
