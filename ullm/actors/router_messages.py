"""What schedulers say to the router, and what the router says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ullm.scheduling.request import RequestRecord
from ullm.scheduling.sequence import TokenEvent

# --- what schedulers say ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReplicaUp:
    """A scheduler is ready for requests.

    Args:
        max_bs: most sequences that it runs at once.
        submit: give it a request; abort: take one away by ``seq_id``.
    """

    replica: int
    epoch: int
    max_bs: int
    submit: Callable[[RequestRecord], None]
    abort: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ReplicaDown:
    """A scheduler has ended; its requests need another one.

    Args:
        in_step: ``seq_id`` of those that its workers were computing.
        crashed: whether that was a loss, not an orderly stop.
    """

    replica: int
    epoch: int
    in_step: frozenset[int]
    crashed: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one step produced."""

    replica: int
    epoch: int
    events: list[TokenEvent]


RouterMessage = ReplicaUp | ReplicaDown | Tokens


# --- what the router keeps --------------------------------------------------------------------------


@dataclass(frozen=True)
class RouterStatistics:
    """Counts since the start, and requests alive now.

    Args:
        live: choices not yet finished, of which ``unassigned`` wait for a replica.
        finished: finish reason → choices; ``error`` for those that failed.
        resumed: submissions of a request that had been submitted before.
        resumed_tokens: tokens computed again because of that.
        admitted_tokens: prompts and possible outputs of the live ones.
    """

    live: int
    unassigned: int
    replicas_up: int
    prompt_tokens: int
    generated_tokens: int
    finished: dict[str, int]
    resumed: int
    resumed_tokens: int
    admitted_tokens: int
