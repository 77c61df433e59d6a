"""Messages from schedulers to the router, and the router's statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import trio

from ullm.actors.block_transfer import AnyTransfer
from ullm.config import Role
from ullm.protocol.messages import ModelInfo
from ullm.scheduling.block_pool import BlockPool
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.sequence import TokenEvent


class SchedulerHandle(Protocol):
    """A scheduler, as the router sees it. Neither method waits, and both are void once it has ended."""

    def submit(self, record: RequestRecord) -> None:
        """Run a request, from its prompt and the tokens that it has emitted."""

    def abort(self, seq_id: int) -> None:
        """Drop a request."""

    def transfer(self, transfer: AnyTransfer) -> None:
        """Have the workers copy KV blocks between two steps."""


@dataclass(frozen=True, slots=True)
class ReplicaUp:
    """A scheduler is ready for requests.

    Args:
        incarnation: counts the starts of this scheduler.
        max_bs: maximum number of sequences that it runs at once.
        scheduler: takes requests.
        pool: its KV blocks, which the router follows; None: it cannot.
        block_size: tokens per block.
        role: what it is for; see `ullm.scheduling.roles`.
        info: the model that its workers have loaded; None where no KV can be handed over.
        ranks: number of its workers.
        shares_memory: whether all of them run on the engine's host.
        ended: set once this scheduler has ended, and its pool with it.
    """

    replica: int
    incarnation: int
    max_bs: int
    scheduler: SchedulerHandle
    pool: BlockPool | None = None
    block_size: int = 0
    role: Role = "both"
    info: ModelInfo | None = None
    ranks: int = 1
    shares_memory: bool = True
    ended: trio.Event = field(default_factory=trio.Event)


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
class Unsendable:
    """A request that no frame carries to a worker; its scheduler has not taken it.

    Args:
        cause: why.
    """

    seq_id: int
    cause: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """The output of one step."""

    replica: int
    incarnation: int
    events: list[TokenEvent]


@dataclass(frozen=True, slots=True)
class HandoverStatistics:
    """Counts of requests that were to move with their KV.

    Args:
        outcomes: ``moved``, or why the request stayed or was computed again → requests.
        blocks: KV blocks that have arrived, on all ranks together.
        bytes: their size.
        seconds: time that these requests' blocks took, beside their computation.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0


RouterMessage = ReplicaUp | ReplicaDown | Tokens | Unsendable


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
        routed: why choices went to the replica that they went to → choices.
        handovers: requests that were to move from one replica to another with their KV.
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
    routed: dict[str, int]
    handovers: HandoverStatistics
