"""One request's record: all that must survive the loss of everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ullm.protocol.messages import TokenLogprobs
from ullm.sampling import SamplingParams
from ullm.scheduling.sequence import FinishReason, TokenEvent


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One choice of one request, owned by the router.

    Its emitted tokens are both what a resumed run starts from and the buffer that its reader reads, so
    nothing can be lost between the two.

    Args:
        seq_id: unique in the router's life.
        request_id: what the client sees; the choices of one request share it.
        prompt_token_ids: the prompt.
        params: with ``seed`` set and ``n`` 1.
        max_total: tokens of prompt and output together at which it ends.
        order: (priority, arrival).
        notify: wakes the reader; called after each change with its time, and with infinity at the end.
        crashes: worker losses while it was in a step, since it last made some progress.
        resumed_at: tokens that it had when it was last given to a replica.
        replica: the replica that runs it; None while it waits for one.
    """

    seq_id: int
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_total: int
    order: tuple[int, int]
    notify: Callable[[float], None]
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

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    def take(self, event: TokenEvent, now: float) -> int:
        """Add what is new in ``event``, at the time ``now``; returns how many tokens were.

        Tokens that are known already (a resumed run repeats none, a late or doubled frame may) are
        dropped by their index.

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
        if event.index == 0:
            self.num_cached_tokens = event.num_cached_tokens
        if event.finish_reason is not None:
            self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
        self.notify(now if event.finish_reason is None else math.inf)
        return len(new)

    def finish(self, reason: FinishReason) -> None:
        """End it with what it has."""
        self.finish_reason = reason
        self.notify(math.inf)

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self.error = error
        self.notify(math.inf)
