"""Speculative decoding in a scheduler: which sequences get a draft, and what became of it."""

from __future__ import annotations

from ullm.scheduling.drafting import WAIT_IN_ROWS, Drafter, can_draft
from ullm.scheduling.sequence import Sequence


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
            sequence.drafter = Drafter(sequence.token_ids)

    def is_worth_waiting(self, running: list[Sequence]) -> bool:
        """Whether drafts gain more than it costs to wait for the tokens before them."""
        if not self._most:
            return False
        drafters = [
            s.drafter for s in running if s.drafter is not None and s.num_computed >= len(s.token_ids) - 1
        ]
        return sum(drafter.value(len(running)) for drafter in drafters) > WAIT_IN_ROWS

    def propose(self, sequence: Sequence, most: int, rows: int) -> list[int]:
        """At most so many guesses of what follows the last token, if that is all there is to compute."""
        length = len(sequence.token_ids)
        if sequence.drafter is None or sequence.num_pending or sequence.num_computed != length - 1:
            return []
        most = min(most, self._most, sequence.max_total - length - 1)
        return sequence.drafter.propose(sequence.token_ids, most, rows)

    def observe(self, sequence: Sequence, taken: int) -> None:
        """Tokens have come: so many, the last of which is no guess."""
        drafted, sequence.num_drafted = sequence.num_drafted, 0
        if drafted:
            self.drafted += drafted
            self.accepted += taken - 1
            if sequence.running:  # else it has lost its blocks meanwhile
                sequence.num_computed += taken - 1
        if sequence.drafter is not None and taken:
            sequence.drafter.observe(sequence.token_ids)
