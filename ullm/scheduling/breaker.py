"""A circuit breaker for one replica: one that keeps dying is tried with one request before it gets its share.

Nygard's pattern ("Release It!", 2007), with the supervisor in the part of the timer: while the breaker is
open, the replica is down and being restarted. It comes back half open if its losses came in quick
succession.
"""

from __future__ import annotations

import math
from typing import Literal

BREAK_AFTER = 2
"""Losses in quick succession after which a replica comes back half open. One is a chance event."""
RELAPSE_SECONDS = 10.0
"""A replica that is lost within this time after it came up has relapsed; one that lives longer is well."""

BreakerState = Literal["closed", "half_open", "open"]


class Breaker:
    """The losses of one replica, over its restarts. All times are trio's."""

    def __init__(self) -> None:
        self._losses = 0
        self._up_at = -math.inf
        self._is_up = self._proven = False

    def up(self, now: float) -> None:
        """Note that the replica takes requests."""
        self._up_at, self._is_up, self._proven = now, True, False

    def lost(self, now: float) -> None:
        """Note that it was lost."""
        self._losses = self._losses + 1 if now - self._up_at < RELAPSE_SECONDS else 1
        self._is_up = False

    def served(self) -> None:
        """Note that it has finished a request: it works, for now."""
        self._proven = True

    def state(self, now: float) -> BreakerState:
        """Return ``closed``: it gets its share; ``half_open``: a request at a time; ``open``: it is down."""
        if not self._is_up:
            return "open"
        on_trial = self._losses >= BREAK_AFTER and not self._proven and now - self._up_at < RELAPSE_SECONDS
        return "half_open" if on_trial else "closed"
