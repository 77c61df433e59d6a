"""The KV blocks of sequences: allocation as they grow, and what they share through the prefix cache."""

from __future__ import annotations

from dataclasses import dataclass

from ullm.scheduling.block_pool import BlockPool, extend_hashes, root_of
from ullm.scheduling.sequence import RUNNING, Sequence

NO_BLOCK = 0
"""Stands in a sequence's table for a block behind the window, which is never read."""


def most_blocks(window: int, step_tokens: int, block_size: int) -> int:
    """Return the most blocks that one sequence needs where no layer sees further than ``window`` keys: those
    of a step's tokens and of the keys that the first of them sees, wherever in a block they begin.

    Args:
        step_tokens: tokens of the largest step.
    """
    return -(-(window - 1 + step_tokens) // block_size) + 1


@dataclass(frozen=True, slots=True)
class Window:
    """The keys that a model sees, where no layer sees all.

    Args:
        tokens: keys that a query sees, itself included.
        most_blocks: see `most_blocks`.
    """

    tokens: int
    most_blocks: int


class SequenceBlocks:
    """Gives sequences blocks of a pool. It never decides who loses blocks: that is the scheduler's part.

    Args:
        pool: the blocks.
        block_size: tokens per block.
        prefix_cache: whether blocks of equal prefixes are shared.
        window: what is behind it is given back; None: the model sees all.

    Attributes:
        queries: prompt tokens looked up in the prefix cache.
        hits: those of them that were found.
    """

    def __init__(
        self, pool: BlockPool, block_size: int, *, prefix_cache: bool, window: Window | None = None
    ) -> None:
        self.pool = pool
        self.queries = self.hits = 0
        self._size = block_size
        self._prefix_cache = prefix_cache
        self._window = window

    def admit(self, sequence: Sequence) -> bool:
        """Take the cached prefix of a waiting sequence, if the rest of it would fit as well.

        Checking the whole sequence, not only its first chunk, keeps long prompts from starting where they
        would be preempted half way.
        """
        cached, first = self._cached_prefix(sequence)
        needed = -(-(len(sequence.token_ids) + 1) // self._size) - len(cached)
        if self._window is not None:
            needed = min(needed, self._window.most_blocks - (len(cached) - first))
        if self.pool.num_available_after_taking(cached[first:]) < needed:
            return False
        self.pool.take(cached[first:])
        sequence.block_ids, sequence.num_behind = cached, first
        sequence.num_published = sequence.num_sent_blocks = len(cached)
        sequence.num_computed = len(cached) * self._size
        if not sequence.num_output_tokens:
            sequence.num_cached_tokens = sequence.num_computed
        self.queries += len(sequence.token_ids)
        self.hits += sequence.num_computed
        return True

    def extend(self, sequence: Sequence, count: int) -> bool:
        """Allocate the blocks for ``count`` more positions, or return False if too few are left.

        First gives back what those positions do not see. Earlier steps may still read it, but steps run in
        order, and no earlier one is planned with the blocks' next owner.
        """
        self._give_back(sequence)
        missing = -(-(sequence.num_computed + count) // self._size) - len(sequence.block_ids)
        if missing > 0:
            if missing > self.pool.num_available:
                return False
            sequence.block_ids += self.pool.allocate(missing)
        return True

    def room(self, sequence: Sequence, reserved: int) -> int:
        """Return how many positions fit beyond a sequence's tokens with ``reserved`` blocks left over."""
        blocks = len(sequence.block_ids) + max(0, self.pool.num_available - reserved)
        return blocks * self._size - len(sequence.token_ids)

    def publish(self, sequence: Sequence) -> None:
        """Offer the blocks that planned steps fill to the prefix cache, except those with drafted tokens.

        Steps run in order, so a sequence that finds a block in a later step reads what is written by then.
        """
        if not self._prefix_cache or sequence.status is not RUNNING:
            return
        full = min(sequence.num_computed, len(sequence.token_ids)) // self._size
        if full == sequence.num_published:
            return
        self._extend_hashes(sequence, full)
        for position in range(sequence.num_published, full):
            self.pool.publish(sequence.block_ids[position], sequence.block_hashes[position])
        sequence.num_published = full

    def release(self, sequence: Sequence) -> None:
        """Release all blocks of a sequence, which has computed nothing then."""
        self.pool.release(sequence.block_ids[sequence.num_behind :])
        sequence.block_ids = []
        sequence.num_computed = sequence.num_published = sequence.num_sent_blocks = sequence.num_behind = 0

    def _first_seen(self, position: int) -> int:
        """Return the first block that a query at a position sees."""
        return 0 if self._window is None else max(0, position - self._window.tokens + 1) // self._size

    def _give_back(self, sequence: Sequence) -> None:
        first = self._first_seen(sequence.num_computed)
        if self._prefix_cache:  # what is offered to others must still be there then
            first = min(first, sequence.num_published)
        if first > sequence.num_behind:
            self.pool.release(sequence.block_ids[sequence.num_behind : first])
            sequence.num_behind = first

    def _cached_prefix(self, sequence: Sequence) -> tuple[list[int], int]:
        """Return the blocks of the longest prefix of which all is known that is still seen, and how many of
        them, at its beginning, are not seen any more; these are `NO_BLOCK`."""
        if not self._prefix_cache or sequence.params.needs_all_positions:
            return [], 0
        # At least one position must be computed, or there are no logits to sample from.
        full = (len(sequence.token_ids) - 1) // self._size
        self._extend_hashes(sequence, full)
        hashes = sequence.block_hashes[:full]
        if self._window is None:
            return self.pool.find(hashes), 0
        count = full
        for position in reversed(range(full)):
            if not self.pool.knows(hashes[position]):
                count = position
            elif position == self._first_seen(count * self._size):
                break
        first = self._first_seen(count * self._size)
        return [NO_BLOCK] * first + self.pool.find(hashes[first:count]), first

    def _extend_hashes(self, sequence: Sequence, count: int) -> None:
        hashes, root = sequence.block_hashes, root_of(sequence)
        if sequence.prompt_hashes is not None:
            sequence.prompt_hashes.extend(hashes, self._size, count, root)
        extend_hashes(hashes, sequence.token_ids, self._size, count, root)
