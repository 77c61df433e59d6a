"""What a scheduler says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerStatistics:
    """What is in the scheduler.

    Args:
        prefix_queries: prompt tokens looked up in the prefix cache since the start.
        prefix_hits: of those, the ones found.
        preemptions: since the start.
        draft_tokens: guessed since the start.
        accepted_tokens: of those, the right ones.
        steps: planned for these workers since they started.
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
