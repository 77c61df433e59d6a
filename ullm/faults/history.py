"""What an injector tells: where a point was hit, what is armed, what has fired and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

HISTORY = 10_000
"""Fired faults to remember."""


class ArmedFault(msgspec.Struct, frozen=True):
    """A fault of a plan, and its counts.

    Args:
        number: counted from 1, in the order in which faults were armed.
        fault: its text, in the language of plans.
        hits: hits of its point that match its filters.
        fired: how often it has happened.
        remaining: how often it may still happen; None: without limit.
    """

    number: int
    fault: str
    hits: int
    fired: int
    remaining: int | None


class FiredFault(msgspec.Struct):
    """A fault that was injected.

    Args:
        number: number of its `ArmedFault`.
        at: time, in seconds since 1970; on a virtual clock, its time.
        hit: number of the hit of its point, counted from 1.
        replica, rank, epoch: place and incarnation of the worker, if it concerned one.
        message: type of the frame, if it concerned one.
        request, token: the request and its token that it was tied to, if it was.
        effect: what was seen of it, as in ``worker lost: was killed by SIGKILL``; empty until then.
        recovered: seconds until whoever was lost was there again: a new worker was ready, the actor came to
            the point again; None until then, and where nobody was lost.
    """

    number: int
    at: float
    point: str
    action: str
    hit: int
    replica: int | None = None
    rank: int | None = None
    epoch: int | None = None
    message: str | None = None
    request: str | None = None
    token: int | None = None
    effect: str = ""
    recovered: float | None = None

    def facts(self) -> dict[str, Any]:
        """Return what is known of it, by name."""
        return msgspec.structs.asdict(self)

    def __str__(self) -> str:
        place = [
            f"{k} {v}"
            for k in ("replica", "rank", "epoch", "message", "request", "token")
            if (v := getattr(self, k)) is not None
        ]
        after = "" if self.recovered is None else f", there again after {self.recovered:.3f} s"
        where = f" ({', '.join(place)})" if place else ""
        effect = self.effect or "no effect seen"
        return f"#{self.number} {self.point}:{self.action} at hit {self.hit}{where}: {effect}{after}"


class FaultReport(msgspec.Struct, frozen=True):
    """All armed faults and the history of an injector.

    Args:
        armed: armed faults, including exhausted ones.
        fired: the last `HISTORY` injected faults, oldest first.
    """

    armed: list[ArmedFault]
    fired: list[FiredFault]


@dataclass(frozen=True, slots=True)
class FaultSite:
    """Where a point is hit; None where no single worker, or no frame, is concerned.

    Args:
        tokens: what it concerns, as (request id, first token, last token), counted from 1; 0: no token.
    """

    point: str
    replica: int | None = None
    rank: int | None = None
    epoch: int | None = None
    message: str | None = None
    tokens: tuple[tuple[str, int, int], ...] = ()
