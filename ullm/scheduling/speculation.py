"""Speculative decoding in a scheduler: which sequences get a draft, and how much of it was accepted."""

from __future__ import annotations

from ullm.scheduling.drafting import WAIT_COST, Drafter, can_draft
from ullm.scheduling.sequence import RUNNING, Sequence


class Speculation:
    """The drafts of one scheduler.

    Args:
        num_speculative_tokens: maximum number of tokens per draft; 0 disables drafts.

    Attributes:
        drafted: tokens drafted since the start.
        accepted: those of them that were right.
    """

    def __init__(self, num_speculative_tokens: int) -> None:
        self._num_speculative_tokens = num_speculative_tokens
        self.drafted = 0
        self.accepted = 0

    def begin(self, sequence: Sequence) -> None:
        """Give a new sequence a drafter, if its request allows drafts."""
        if self._num_speculative_tokens and can_draft(sequence.params):
            sequence.drafter = Drafter(sequence.token_ids)

    def is_worth_waiting(self, running: list[Sequence]) -> bool:
        """Whether drafts gain more than it costs to wait for the tokens before them."""
        if not self._num_speculative_tokens:
            return False
        drafters = [
            s.drafter for s in running if s.drafter is not None and s.num_computed >= len(s.token_ids) - 1
        ]
        return sum(drafter.value(len(running)) for drafter in drafters) > WAIT_COST

    def propose(self, sequence: Sequence, limit: int, batch_size: int) -> list[int]:
        """Draft up to ``limit`` tokens; none unless the last token is all that is left to compute."""
        length = len(sequence.token_ids)
        if sequence.drafter is None or sequence.num_pending or sequence.num_computed != length - 1:
            return []
        limit = min(limit, self._num_speculative_tokens, sequence.max_total - length - 1)
        return sequence.drafter.propose(sequence.token_ids, limit, batch_size)

    def observe(self, sequence: Sequence, count: int) -> None:
        """Account for ``count`` sampled tokens; all but the last were drafted."""
        drafted, sequence.num_drafted = sequence.num_drafted, 0
        if drafted:
            self.drafted += drafted
            self.accepted += count - 1
            if sequence.status is RUNNING:  # otherwise it has lost its blocks meanwhile
                sequence.num_computed += count - 1
        if sequence.drafter is not None and count:
            sequence.drafter.observe(sequence.token_ids)
