"""The KV blocks of sequences: allocation as they grow, and what they share through the prefix cache."""

from __future__ import annotations

from ullm.scheduling.block_pool import ROOT_HASH, BlockPool, block_hash
from ullm.scheduling.sequence import RUNNING, Sequence


class SequenceBlocks:
    """Gives sequences blocks of a pool. It never decides who loses blocks: that is the scheduler's part.

    Args:
        pool: the blocks.
        block_size: tokens per block.
        prefix_cache: whether blocks of equal prefixes are shared.

    Attributes:
        queries: prompt tokens looked up in the prefix cache.
        hits: those of them that were found.
    """

    def __init__(self, pool: BlockPool, block_size: int, *, prefix_cache: bool) -> None:
        self.pool = pool
        self.queries = self.hits = 0
        self._size = block_size
        self._prefix_cache = prefix_cache

    def admit(self, sequence: Sequence) -> bool:
        """Take the cached prefix of a waiting sequence, if the rest of it would fit as well.

        Checking the whole sequence, not only its first chunk, keeps long prompts from starting where they
        would be preempted half way.
        """
        cached = self._cached_prefix(sequence)
        needed = -(-(len(sequence.token_ids) + 1) // self._size) - len(cached)
        if self.pool.num_available_after_taking(cached) < needed:
            return False
        self.pool.take(cached)
        sequence.block_ids = cached
        sequence.num_published = sequence.num_sent_blocks = len(cached)
        sequence.num_computed = len(cached) * self._size
        if not sequence.num_output_tokens:
            sequence.num_cached_tokens = sequence.num_computed
        self.queries += len(sequence.token_ids)
        self.hits += sequence.num_computed
        return True

    def extend(self, sequence: Sequence, count: int) -> bool:
        """Allocate the blocks for ``count`` more positions, or return False if too few are left."""
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
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = sequence.num_published = sequence.num_sent_blocks = 0

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        if not self._prefix_cache or sequence.params.prompt_logprobs is not None:
            return []  # prompt log probabilities need the logits of every position
        # At least one position must be computed, or there are no logits to sample from.
        full = (len(sequence.token_ids) - 1) // self._size
        self._extend_hashes(sequence, full)
        return self.pool.find(sequence.block_hashes[:full])

    def _extend_hashes(self, sequence: Sequence, count: int) -> None:
        hashes, size = sequence.block_hashes, self._size
        for position in range(len(hashes), count):
            parent = hashes[-1] if hashes else ROOT_HASH
            hashes.append(block_hash(parent, sequence.token_ids[position * size : (position + 1) * size]))
