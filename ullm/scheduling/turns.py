"""Fair turns: of requests that wait, those of each client come in turn, however many one of them has sent.

Start-time fair queueing (Goyal, Vin and Cheng, 1996), where each choice of a request costs the same. A
client's choices get turns one after the other. The first of a client without waiting ones gets the turn that
is being served, so it comes before what others have queued for later, and gains nothing from its absence.
"""

from __future__ import annotations

REMEMBERED = 1024
"""Clients whose last turn is kept; beyond that, those whose turn is over are forgotten."""


class Turns:
    """Gives out turns; of equal priority, the lowest turn runs first."""

    def __init__(self) -> None:
        self._current = 0
        self._last: dict[str, int] = {}
        self._forget_at = REMEMBERED

    def take(self, client: str) -> int:
        """Return the turn of a client's next choice."""
        turn = max(self._current, self._last.get(client, -1) + 1)
        self._last[client] = turn
        if len(self._last) > self._forget_at:
            self._last = {name: last for name, last in self._last.items() if last >= self._current}
            self._forget_at = max(REMEMBERED, 2 * len(self._last))
        return turn

    def served(self, turn: int) -> None:
        """Note that a choice with this turn runs, or has ended."""
        self._current = max(self._current, turn)
