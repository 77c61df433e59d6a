"""What a scheduler reports about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerStatistics:
    """Sequences and blocks in a scheduler now, and counts since the start.

    Args:
        prefix_queries: prompt tokens looked up in the prefix cache.
        prefix_hits: those of them that were found.
        preemptions: sequences that lost their blocks to others.
        draft_tokens: tokens drafted.
        accepted_tokens: drafted tokens that were accepted.
        steps: steps planned for these workers since they started.
    """

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    draft_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
