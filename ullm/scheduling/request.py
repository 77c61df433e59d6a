"""One request's record: the only state that must survive the loss of everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ullm.protocol.messages import Adapter, TokenLogprobs
from ullm.sampling import SamplingParams
from ullm.scheduling.block_pool import PromptHashes
from ullm.scheduling.sequence import FinishReason, TokenEvent

SUSPECT_AFTER = 2
"""Worker losses in a row after which a request that was being computed each time runs alone."""
CLEARED_AFTER = 4
"""Tokens after which a request is no longer blamed for earlier losses, and no longer runs alone. A request
that kills its worker would do so again in its first step, because it resumes exactly where it was."""


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One choice of one request, owned by the router.

    Its emitted tokens are both the start of a resumed run and the buffer that its reader reads, so nothing
    can be lost between the two.

    Args:
        seq_id: unique in the router's life.
        request_id: shown to the client; the choices of one request share it.
        prompt_token_ids: the prompt.
        params: with ``seed`` set and ``n`` 1.
        max_total: tokens of prompt and output together at which it ends.
        arrival: its place among all requests; of equal priority and turn, the lower one runs first.
        notify: wakes the reader; called after each change with its time, and with infinity at the end.
        grammar: what constrains its tokens, in llguidance's format; empty if nothing does.
        adapter: the adapter that it is computed with.
        crashes: worker losses while it was in a step, since it last made some progress.
        resumed_at: tokens that it had when it was last assigned to a replica.
        replica: the replica that runs it; None while it waits for one.
        client: who sent it, as far as turns are concerned.
        embedding: its pooled prompt, if it is pooled; see `ullm.protocol.messages.Sampled`.
        turn: see `ullm.scheduling.turns`; given when it is submitted.
        session: requests of one session go to the same replica; empty: it belongs to none.
        migrations: losses of a replica that had begun to compute it.
        block_hashes: hashes of its leading full blocks, as far as they were needed.
        prompt_hashes: those of the prompt, which the choices of one request share.
    """

    seq_id: int
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_total: int
    arrival: int
    notify: Callable[[float], None]
    grammar: str = ""
    adapter: Adapter | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: Exception | None = None
    replica: int | None = None
    crashes: int = 0
    resumed_at: int = 0
    client: str = ""
    turn: int = 0
    embedding: bytes = b""
    session: str = ""
    migrations: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    prompt_hashes: PromptHashes = None  # type: ignore[assignment]  # its own, if it is not given

    def __post_init__(self) -> None:
        if self.prompt_hashes is None:
            self.prompt_hashes = PromptHashes(self.prompt_token_ids)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def is_suspect(self) -> bool:
        """Whether it runs alone, because it may be the cause of worker losses."""
        return self.crashes >= SUSPECT_AFTER

    @property
    def queue_key(self) -> tuple[int, int, int]:
        """(priority, turn, arrival), by which schedulers order their sequences."""
        return self.params.priority, self.turn, self.arrival

    def take(self, event: TokenEvent, now: float) -> int:
        """Append the new tokens of ``event``, at the time ``now``; return their number.

        Known tokens are dropped by their index; a late or doubled frame may repeat some.

        Raises:
            ValueError: the event leaves a gap; the caller must resume the request.
        """
        known = len(self.token_ids) - event.index
        if known < 0:
            raise ValueError(f"tokens {len(self.token_ids)} to {event.index - 1} are missing")
        new = event.token_ids[known:] if known else event.token_ids
        self.token_ids += new
        if event.logprobs is not None:
            self.logprobs += event.logprobs[known:]
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = (self.prompt_logprobs or []) + event.prompt_logprobs
        self.embedding = event.embedding or self.embedding
        if event.index == 0:
            self.num_cached_tokens = event.num_cached_tokens
        if event.finish_reason is not None:
            self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
        self.notify(now if event.finish_reason is None else math.inf)
        if self.crashes and len(self.token_ids) >= self.resumed_at + CLEARED_AFTER:
            self.crashes = 0
        return len(new)

    def finish(self, reason: FinishReason) -> None:
        """End it with the tokens that it has."""
        self.finish_reason = reason
        self.notify(math.inf)

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self.error = error
        self.notify(math.inf)
