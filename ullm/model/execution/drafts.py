"""Draft verification: the positions that a step samples, and how many guesses of each draft were right."""

from __future__ import annotations

from dataclasses import dataclass, field

from ullm.model.execution.sequences import SequenceState, StepPlan
from ullm.protocol.messages import ScheduledSequence


@dataclass(slots=True)
class SampledPositions:
    """The positions of a batch after which a step samples: one per sequence, or, with a draft, several.

    Args:
        sequences: the scheduled sequences that sample, with what this rank knows of them.
        first: per sequence, the index of its first position in ``positions``.
        positions: indices of tokens of the batch, ascending; a token is sampled from the logits of each.
        seq_ids: per position, its sequence.
        ahead: per position, how many positions of its sequence come before it.
        drafted: True if any sequence has a draft.
    """

    sequences: list[tuple[ScheduledSequence, SequenceState]] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    seq_ids: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)
    drafted: bool = False

    @property
    def drafts(self) -> dict[int, list[int]]:
        """Sequence → its draft, for those that have one."""
        return {each.seq_id: each.draft for each, _ in self.sequences if each.draft}

    def count_accepted(self, tokens: list[int]) -> list[int]:
        """Return, per sequence, how many guesses come before the first wrong one.

        Args:
            tokens: per position, the token that was sampled.
        """
        return [
            count_right(scheduled.draft, tokens[first : first + len(scheduled.draft)])
            for (scheduled, _), first in zip(self.sequences, self.first, strict=True)
        ]


def sampled_positions(plan: StepPlan) -> SampledPositions:
    """Return the positions that a planned step samples."""
    sampled = SampledPositions()
    for (scheduled, state), end in zip(plan.sequences, plan.ends, strict=True):
        if not scheduled.sample:
            continue
        count = 1 + len(scheduled.draft)
        sampled.sequences.append((scheduled, state))
        sampled.first.append(len(sampled.positions))
        sampled.positions += range(end - count, end)
        sampled.seq_ids += [scheduled.seq_id] * count
        sampled.ahead += range(count)
        sampled.drafted |= count > 1
    return sampled


def count_right(draft: list[int], tokens: list[int]) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(draft, tokens, strict=True))
    return next((i for i, (guess, token) in pairs if guess != token), len(draft))
