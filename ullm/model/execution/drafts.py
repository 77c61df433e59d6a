"""Verifying drafts: which positions of a step are sampled, and how many guesses were right."""

from __future__ import annotations

from dataclasses import dataclass, field

from ullm.model.execution.sequences import Plan, SequenceState
from ullm.protocol.messages import ScheduledSequence


@dataclass(slots=True)
class Draws:
    """The draws of a step, one or, with a draft, several in succession per sampling row.

    Args:
        rows: the rows that sample, with their sequences.
        first: per row, index of its first draw.
        positions: per draw, the token of the batch whose logits it is drawn from; ascending.
        seq_ids: per draw, its sequence.
        ahead: per draw, how many draws of its row come before it.
        drafted: whether any row has a draft.
    """

    rows: list[tuple[ScheduledSequence, SequenceState]] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    seq_ids: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)
    drafted: bool = False

    def count_accepted(self, tokens: list[int]) -> list[int]:
        """Per row, the guesses before the first wrong one.

        Args:
            tokens: per draw, what was drawn.
        """
        return [
            count_right(row.draft, tokens[first : first + len(row.draft)])
            for (row, _), first in zip(self.rows, self.first, strict=True)
        ]


def draws_of(plan: Plan) -> Draws:
    """The draws that a planned step asks for."""
    draws = Draws()
    for (row, state), end in zip(plan.rows, plan.ends, strict=True):
        if not row.sample:
            continue
        draws.rows.append((row, state))
        draws.first.append(len(draws.positions))
        if not row.draft:
            draws.positions.append(end - 1)
            draws.seq_ids.append(row.seq_id)
            draws.ahead.append(0)
            continue
        count = 1 + len(row.draft)
        draws.drafted = True
        draws.positions += range(end - count, end)
        draws.seq_ids += [row.seq_id] * count
        draws.ahead += range(count)
    return draws


def count_right(draft: list[int], tokens: list[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(draft, tokens, strict=True))
    return next((i for i, (guess, token) in pairs if guess != token), len(draft))
