"""Which of several replicas a request goes to. Pure; the router calls it for one request after the other.

In this order:

0. With ``--roles``, a request with a long way to its first token goes to a replica for prefill, from which it
   moves on with its KV; others go to one for decode. Where no replica with that role is up, all may get it.
1. A replica on trial (`ullm.scheduling.breaker`) gets one request at a time, unless all are on trial.
2. A session goes to the replica that had its last request, while that one has room in its batch.
3. Otherwise the policy decides; with ``prefix`` by the lowest cost, in tokens of prefill:

       cost = 2 × tokens of the request that the replica must compute
            + tokens that it must compute for its requests without a first token
            + LOAD_TOKENS for each request that it has

   Tokens to compute count twice, because the request waits for them, and so do the replica's other requests.

   Replicas with room in their batch come before those without; of equal costs, the one with fewer cached
   blocks wins, so that an idle fleet fills all of its caches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from ullm.config import Role
from ullm.scheduling.block_pool import extend_hashes, root_of
from ullm.scheduling.breaker import Breaker
from ullm.scheduling.prefix_index import PrefixIndex, ReplicaBlocks
from ullm.scheduling.request import RequestRecord

LOAD_TOKENS = 64
"""Tokens of prefill that one more request in the batch weighs as much as: a cached prefix of 640 tokens
outweighs twenty more neighbours."""
SESSIONS_REMEMBERED = 65_536
"""Sessions whose replica is known; beyond that, the ones that were used least recently are forgotten."""

RoutingPolicy = Literal["prefix", "least-loaded", "round-robin"]
Reason = Literal["session", "prefix", "load", "turn"]
"""Why a request went where it went: its session, a cached prefix, the load alone, or its turn."""


@dataclass(slots=True, eq=False)
class ReplicaLoad:
    """What one replica has to do.

    Args:
        requests: those that it has, by ``seq_id``.
        index: the replica's number.
        max_bs: requests that it runs at once.
        breaker: see `ullm.scheduling.breaker`.
        blocks: its part of the prefix index; None where there is none.
        role: what it is for; see `ullm.config.ParallelConfig`.
        prefilling: requests without a first token → tokens to compute for it, and blocks that come of it.
        pending: those tokens of all requests.
    """

    requests: dict[int, RequestRecord] = field(default_factory=dict)
    index: int = 0
    max_bs: int = 1 << 30
    breaker: Breaker = field(default_factory=Breaker)
    blocks: ReplicaBlocks | None = None
    prefilling: dict[int, tuple[int, list[bytes]]] = field(default_factory=dict)
    pending: int = 0
    role: Role = "both"

    @property
    def has_suspect(self) -> bool:
        """Whether it runs a suspect, which must stay alone."""
        return len(self.requests) == 1 and next(iter(self.requests.values())).is_suspect

    @property
    def is_full(self) -> bool:
        """Whether a further request would wait for a place in its batch."""
        return len(self.requests) >= self.max_bs

    def add(self, record: RequestRecord, cached_blocks: int, block_size: int) -> None:
        """Note a request that was given to the replica.

        Args:
            cached_blocks: leading blocks that need not be computed.
        """
        self.requests[record.seq_id] = record
        tokens = len(record.prompt_token_ids) + len(record.token_ids) - cached_blocks * block_size
        new = record.block_hashes[cached_blocks:]
        self.prefilling[record.seq_id] = (tokens, new)
        self.pending += tokens
        if self.blocks is not None:
            self.blocks.expect(new)

    def has_begun(self, seq_id: int) -> None:
        """Note that a request has a token: its prompt is computed."""
        tokens, new = self.prefilling.pop(seq_id, (0, []))
        self.pending -= tokens
        if new and self.blocks is not None:
            self.blocks.expect_no_more(new)

    def remove(self, seq_id: int) -> None:
        """Note that a request has ended, or was taken back."""
        self.requests.pop(seq_id, None)
        self.has_begun(seq_id)


R = TypeVar("R", bound=ReplicaLoad)


class Routing:
    """The choice of a replica, and what it needs to remember.

    Args:
        policy: ``prefix``, ``least-loaded`` or ``round-robin``.
        prefill_threshold: tokens to compute from which a request goes to a replica for prefill.

    Attributes:
        index: what the replicas have cached, with ``prefix``; else None.
        block_size: tokens per block, once a replica has told.
        reasons: why requests went where they went → choices.
    """

    def __init__(self, policy: RoutingPolicy, prefill_threshold: int = 1) -> None:
        self.index = PrefixIndex() if policy == "prefix" else None
        self.block_size = 0
        self.reasons: dict[str, int] = {}
        self._policy = policy
        self._prefill_threshold = prefill_threshold
        self._sessions: OrderedDict[str, int] = OrderedDict()
        self._last = -1

    def choose(self, record: RequestRecord, replicas: Sequence[R], now: float) -> tuple[R, int]:
        """Return a replica for a request, and how many of its leading blocks that one has cached.

        Args:
            replicas: those that may get it, at least one.
            now: trio's time.
        """
        usable = [r for r in replicas if not r.requests or r.breaker.state(now) == "closed"] or replicas
        depths = self._depths(record, usable)
        usable = self._in_role(record, usable, depths)
        reason: Reason
        if (former := self._of_session(record.session, usable)) is not None:
            chosen, reason = former, "session"
        elif self._policy == "round-robin":
            chosen, reason = self._next(usable), "turn"
        elif self._policy == "least-loaded" or len(usable) == 1:
            chosen, reason = min(usable, key=lambda replica: len(replica.requests)), "load"
        else:
            chosen = self._cheapest(record, usable, depths)
            reason = "prefix" if _depth(chosen, depths) else "load"
        if record.session:
            self.remember(record.session, chosen.index)
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        return chosen, _depth(chosen, depths)

    def next_home(self, record: RequestRecord, replicas: Sequence[R], now: float) -> R | None:
        """Return the replica that a request whose prompt is computed should move on to; None: it stays.

        Args:
            replicas: those that it may move to.
        """
        open_ = [r for r in replicas if not (r.is_full or r.has_suspect) and r.breaker.state(now) == "closed"]
        usable = [r for r in open_ if r.role != "prefill"]
        return self._cheapest(record, usable, self._depths(record, usable)) if usable else None

    def _cheapest(self, record: RequestRecord, replicas: Sequence[R], depths: dict[int, int]) -> R:
        length, size = len(record.prompt_token_ids) + len(record.token_ids), self.block_size
        return min(replicas, key=lambda r: _cost(r, length - size * _depth(r, depths)))

    def _in_role(self, record: RequestRecord, replicas: Sequence[R], depths: dict[int, int]) -> Sequence[R]:
        """Return the replicas that are for a request, or all if none of them is."""
        decoding = [replica for replica in replicas if replica.role != "prefill"]
        if len(decoding) == len(replicas) and all(replica.role == "both" for replica in replicas):
            return replicas
        length = len(record.prompt_token_ids) + len(record.token_ids)
        cached = max((_depth(replica, depths) for replica in decoding), default=0) * self.block_size
        # What cannot use a prefix cache would be computed twice.
        is_long = length - cached >= self._prefill_threshold and not record.params.needs_all_positions
        return ([r for r in replicas if r.role != "decode"] if is_long else decoding) or replicas

    def _depths(self, record: RequestRecord, replicas: Sequence[R]) -> dict[int, int]:
        if self.index is None or not self.block_size or record.params.needs_all_positions:
            return {}  # prompt log probabilities use no cache
        tokens, size = [*record.prompt_token_ids, *record.token_ids], self.block_size
        # The last token is computed in any case, or there would be no logits.
        count, root = (len(tokens) - 1) // size, root_of(record)
        record.prompt_hashes.extend(record.block_hashes, size, count, root)
        extend_hashes(record.block_hashes, tokens, size, count, root)
        return self.index.depths(record.block_hashes, (r.blocks for r in replicas if r.blocks is not None))

    def _of_session(self, session: str, replicas: Sequence[R]) -> R | None:
        index = self._sessions.get(session) if session else None
        return next((r for r in replicas if r.index == index and not r.is_full), None)

    def remember(self, session: str, index: int) -> None:
        """Have further requests of a session go to this replica."""
        self._sessions[session] = index
        self._sessions.move_to_end(session)
        if len(self._sessions) > SESSIONS_REMEMBERED:
            self._sessions.popitem(last=False)

    def _next(self, replicas: Sequence[R]) -> R:
        ordered = sorted(replicas, key=lambda replica: replica.index)
        chosen = next((r for r in ordered if r.index > self._last), ordered[0])
        self._last = chosen.index
        return chosen


def _depth(replica: ReplicaLoad, depths: dict[int, int]) -> int:
    return depths.get(replica.blocks.bit, 0) if replica.blocks is not None else 0


def _cost(replica: ReplicaLoad, to_compute: int) -> tuple[bool, int, int]:
    """Return what a replica is compared by; see the module's docstring."""
    cost = 2 * to_compute + replica.pending + LOAD_TOKENS * len(replica.requests)
    return replica.is_full, cost, replica.blocks.count if replica.blocks is not None else 0
