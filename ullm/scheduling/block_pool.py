"""The pool of KV blocks, and the prefix cache: blocks found again by the hash of what they hold."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

ROOT_HASH = b""
"""The hash before a sequence's first block."""


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full block and all before it.

    Keyed by content with a cryptographic hash: with Python's own, a client could construct a prompt
    that reads another client's KV.
    """
    return blake2b(array("q", token_ids).tobytes(), digest_size=16, key=parent).digest()


@dataclass(frozen=True)
class BlockStatistics:
    """What is in the pool.

    Args:
        total: blocks in the pool.
        used: blocks that sequences hold.
        cached: unused blocks whose content can still be found by hash.
    """

    total: int
    used: int
    cached: int


class BlockPool:
    """Hands out block numbers ``0 … num_blocks - 1`` and counts who holds them.

    A released block that was published keeps its content until it is needed: blank blocks go first,
    last released first, so that a lightly used pool touches little memory; then published ones, least
    recently used first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out."""
        return len(self._blank) + len(self._evictable)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix of ``hashes``; they are not taken yet."""
        found = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_after_taking(self, found: Sequence[int]) -> int:
        """Free blocks that would be left if the ``found`` ones were taken."""
        return self.num_free - sum(1 for block in found if not self._holders[block])

    def take(self, found: Sequence[int]) -> None:
        """Hold blocks that `find` returned; others may hold them too."""
        for block in found:
            self._evictable.pop(block, None)
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks for new content. The caller has checked `num_free`."""
        return [self._allocate_one() for _ in range(count)]

    def _allocate_one(self) -> int:
        block = self._blank.pop() if self._blank else self._evict()
        self._holders[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """Let later sequences find a held, full block. The first of two equal blocks stays known."""
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, given in the order of its positions.

        The end of a sequence is let go first, so that beginnings, which more requests share, are
        evicted last.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._hash_of:
                    self._evictable[block] = None
                else:
                    self._blank.append(block)

    def statistics(self) -> BlockStatistics:
        """What is in the pool, as a frozen value."""
        return BlockStatistics(self.num_blocks, self.num_blocks - self.num_free, len(self._evictable))

    def check_integrity(self) -> None:
        """Raise AssertionError unless each block is in exactly one place; for tests."""
        held = {block for block, holders in enumerate(self._holders) if holders > 0}
        blank, evictable = set(self._blank), set(self._evictable)
        assert len(blank) == len(self._blank), "a blank block is listed twice"
        assert len(held) + len(blank) + len(evictable) == self.num_blocks, "a block is lost or doubled"
        assert held | blank | evictable == set(range(self.num_blocks)), "a block is in two places"
        assert min(self._holders, default=0) >= 0, "a block was released more often than taken"
        assert {digest: block for block, digest in self._hash_of.items()} == self._block_of
        assert not blank & set(self._hash_of), "a blank block has a hash"
        assert evictable <= set(self._hash_of), "an evictable block has no hash"
