"""Messages from schedulers to the router, and the router's statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ullm.scheduling.request import RequestRecord
from ullm.scheduling.sequence import TokenEvent


class SchedulerHandle(Protocol):
    """A scheduler, as the router sees it. Neither method waits, and both are void once it has ended."""

    def submit(self, record: RequestRecord) -> None:
        """Run a request, from its prompt and the tokens that it has emitted."""

    def abort(self, seq_id: int) -> None:
        """Drop a request."""


@dataclass(frozen=True, slots=True)
class ReplicaUp:
    """A scheduler is ready for requests.

    Args:
        incarnation: counts the starts of this scheduler.
        max_bs: maximum number of sequences that it runs at once.
        scheduler: takes requests.
    """

    replica: int
    incarnation: int
    max_bs: int
    scheduler: SchedulerHandle


@dataclass(frozen=True, slots=True)
class ReplicaDown:
    """A scheduler has ended; its requests need another one.

    Args:
        incarnation: the scheduler's, which may restart while its workers live on.
        in_step: ``seq_id`` of the requests that its workers were computing.
        crashed: whether it was a loss, not an orderly stop.
    """

    replica: int
    incarnation: int
    in_step: frozenset[int]
    crashed: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """The output of one step."""

    replica: int
    incarnation: int
    events: list[TokenEvent]


RouterMessage = ReplicaUp | ReplicaDown | Tokens


@dataclass(frozen=True)
class RouterStatistics:
    """Requests that are live now, and counts since the start.

    Args:
        live: choices not yet finished.
        unassigned: live choices that wait for a replica.
        finished: finish reason → choices; ``error`` for those that failed.
        resumed: submissions of requests that had been submitted before.
        resumed_tokens: tokens computed again because of that.
        admitted_tokens: prompt tokens and possible output tokens of the live choices.
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
