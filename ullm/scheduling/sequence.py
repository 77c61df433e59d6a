"""One sequence: its tokens, its KV blocks, and its progress."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from ullm.protocol.messages import Adapter, TokenLogprobs
from ullm.sampling import SamplingParams
from ullm.scheduling.block_pool import PromptHashes
from ullm.scheduling.drafting import Drafter

FinishReason = Literal["stop", "length", "abort", "timeout"]


class TokenEvent(msgspec.Struct, frozen=True, gc=False):
    """New tokens of one sequence, or its end, or both.

    Args:
        seq_id: the sequence.
        index: index of the first token in ``token_ids``, counted from the first generated token; a reader
            drops tokens that it has seen already.
        stop_reason: the token that ended the sequence, unless it is an end-of-sequence token.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        error: why it cannot go on, in which case it has ended without a finish reason.
        lacks_adapter: whether that is because its adapter cannot be loaded.
        embedding: see `ullm.protocol.messages.Sampled`.
    """

    seq_id: int
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str = ""
    lacks_adapter: bool = False
    embedding: bytes = b""


class SequenceStatus(enum.Enum):
    """Where a sequence is in its scheduler; preemption takes a running one back to waiting."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


WAITING, RUNNING, FINISHED = SequenceStatus  # looked up for each sequence in each step


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence in the scheduler.

    Args:
        seq_id: given by the router; unique in its life.
        token_ids: every token whose value is known, the prompt first.
        num_prompt_tokens: length of the original prompt.
        max_total: tokens of prompt and output together at which it ends.
        queue_key: (priority, turn, arrival); the lowest runs first and is preempted last.
        num_computed: leading positions whose KV is computed, or will be by steps already planned.
        num_pending: tokens that planned steps will sample, whose values are not known yet.
        num_published: leading blocks offered to the prefix cache.
        num_sent_blocks: leading blocks that the worker knows.
        num_behind: leading blocks that are behind the model's window and not its own any more.
        num_drafted: drafted tokens in the planned step; nothing more can be planned until they are verified.
        drafter: drafts further tokens; None: tokens are computed one by one.
        last_planned: number of the last step that computes part of it.
        stop_token_ids: tokens that end it.
        grammar: what constrains its output, in llguidance's format; empty if nothing does.
        adapter: the adapter that it is computed with.
        prompt_hashes: hashes of the prompt's blocks, shared by the choices of a request.
    """

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    max_total: int
    queue_key: tuple[int, ...]
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0
    num_published: int = 0
    num_sent_blocks: int = 0
    num_behind: int = 0
    num_drafted: int = 0
    drafter: Drafter | None = None
    num_cached_tokens: int = 0
    status: SequenceStatus = WAITING
    last_planned: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    grammar: str = ""
    adapter: Adapter | None = None
    prompt_hashes: PromptHashes | None = None

    def append(self, token_id: int) -> None:
        """Append a generated token; up to the first one the choices of a request share the prompt's list."""
        if len(self.token_ids) == self.num_prompt_tokens:
            self.token_ids = self.token_ids.copy()
        self.token_ids.append(token_id)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens whose values are known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_to_compute(self) -> int:
        """Positions that can be planned now; 0 once the pending tokens reach the end."""
        planned = len(self.token_ids) + self.num_pending
        return 0 if planned >= self.max_total or self.num_drafted else planned - self.num_computed

    @property
    def frame_bytes(self) -> int:
        """Upper bound of what it takes to describe it to a worker."""
        params = self.params
        numbers = len(self.token_ids) + len(params.stop_token_ids) + 2 * len(params.logit_bias)
        named = 0 if self.adapter is None else len(self.adapter.name) + len(self.adapter.path)
        return 9 * numbers + 4 * (len(self.grammar) + named) + 1024

    def set_stop_token_ids(self, eos_token_ids: frozenset[int]) -> None:
        """Collect the tokens that end it: end-of-sequence tokens, unless ignored, and the request's own."""
        eos = frozenset() if self.params.ignore_eos else eos_token_ids
        self.stop_token_ids = eos.union(self.params.stop_token_ids) if self.params.stop_token_ids else eos

    def finish_reason(self, token_id: int) -> FinishReason | None:
        """Return why ``token_id``, just appended, ends the sequence; None if it does not.

        Below ``min_tokens`` the sampler makes stop tokens impossible, but a grammar or a logit bias could
        still force one, so it is checked here, too.
        """
        if token_id in self.stop_token_ids and self.num_output_tokens > self.params.min_tokens:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_total else None
