"""Speculative decoding in a scheduler: which sequences get a draft, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable

from ullm.core.drafting import Drafter, can_draft
from ullm.core.sequence import Sequence


class Speculation:
    """The drafts of one scheduler.

    Args:
        most: tokens per draft; 0: there are none.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.drafted = 0
        self.accepted = 0

    def begin(self, sequence: Sequence) -> None:
        """From now on it may get drafts, if its request allows any."""
        if self._most and can_draft(sequence.params):
            sequence.drafter = Drafter()

    def wants_any(self, running: Iterable[Sequence]) -> bool:
        """Whether a sequence may get a draft as soon as its last token is known."""
        return self._most > 0 and any(
            s.drafter is not None and not s.drafter.waits(len(s.token_ids)) for s in running
        )

    def propose(self, sequence: Sequence, most: int, rows: int) -> list[int]:
        """At most so many guesses of what follows the last token, if that is all there is to compute."""
        length = len(sequence.token_ids)
        if sequence.drafter is None or sequence.num_pending or sequence.num_computed != length - 1:
            return []
        most = min(most, self._most, sequence.max_total - length - 1)
        return sequence.drafter.propose(sequence.token_ids, most, rows)

    def learn(self, sequence: Sequence, accepted: int, rows: int) -> None:
        """The sequence's draft is verified, and its tokens are taken in."""
        drafted, sequence.num_drafted = sequence.num_drafted, 0
        self.drafted += drafted
        self.accepted += accepted
        if sequence.running:  # else it has lost its blocks meanwhile
            sequence.num_computed += accepted
        if sequence.drafter is not None:
            sequence.drafter.learn(drafted, accepted, len(sequence.token_ids), rows)
