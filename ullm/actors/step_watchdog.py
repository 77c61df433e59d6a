"""Who owes an answer, since when, and how long that may go on."""

from __future__ import annotations

import trio

LOOK_SECONDS = 0.5
"""How often a rank that owes an answer is looked at from outside."""

LATE_SECONDS = 0.2
"""For an answer that is overdue to be read after all, before its worker is given up."""

SUSPENDED_SECONDS = 1.0
"""How long a rank may be suspended, by SIGSTOP, before it is given up: nobody does that in passing."""


class StepWatchdog:
    """Of one rank: which answers it owes, and when its next sign of life is due."""

    def __init__(self, patience: float) -> None:
        self.scope = trio.CancelScope()
        self._patience = patience
        self._owed: dict[object, float] = {}

    def renewed(self) -> trio.CancelScope:
        """The scope to wait in, which ends when a sign of life is overdue; a new one after the last has."""
        if self.scope.cancel_called:
            self.scope = trio.CancelScope(deadline=trio.current_time() + self._patience)
        return self.scope

    def owe(self, answer: object) -> None:
        """An answer is due from now on; the first one starts the clock."""
        if not self._owed:
            self.extend(self._patience)
        self._owed[answer] = trio.current_time()

    def settle(self, answer: object) -> float | None:
        """An answer has come; returns when it was asked for, None if it was not owed (any more)."""
        asked = self._owed.pop(answer, None)
        if asked is not None:
            self.extend(self._patience if self._owed else float("inf"))
        return asked

    def skipped(self, step_id: int) -> int | None:
        """The step whose result must come before that of an owed one; None if there is none."""
        steps = [owed[1] for owed in self._owed if isinstance(owed, tuple) and owed[0] == "step"]
        return steps[0] if step_id in steps[1:] else None

    def extend(self, seconds: float) -> None:
        """There was a sign of life; the next one is due in so many seconds."""
        self.scope.deadline = trio.current_time() + seconds

    @property
    def is_idle(self) -> bool:
        """Whether nothing is owed."""
        return not self._owed
