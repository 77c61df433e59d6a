"""An index of which replicas have which KV blocks cached: the router's view of every replica's block pool.

A block's hash covers all blocks before it (`ullm.scheduling.block_pool`), so one dictionary from hash to
replicas is a radix tree with an edge per block. The pools report each block that they publish and evict, so
the index is exact. Beside them stand the blocks that a replica will have soon, because it was given a request
with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PrefixIndex:
    """Block hash → the replicas that have, or expect, that block. Replicas are bits of an integer."""

    def __init__(self) -> None:
        self._cached: dict[bytes, int] = {}
        self._expected: dict[bytes, int] = {}
        self._taken = 0

    def join(self) -> ReplicaBlocks:
        """Return the view of a replica that has nothing cached yet."""
        bit = ~self._taken & (self._taken + 1)
        self._taken |= bit
        return ReplicaBlocks(bit, self._cached, self._expected)

    def leave(self, blocks: ReplicaBlocks) -> None:
        """Forget a replica's blocks: its workers are gone. Their `ReplicaBlocks` is of no more use."""
        blocks.clear()
        self._taken &= ~blocks.bit

    def depths(self, hashes: Sequence[bytes], among: Iterable[ReplicaBlocks]) -> dict[int, int]:
        """Return how many leading blocks of ``hashes`` each replica has, by its bit, unless it has none.

        The walk ends where no replica has a block, however many replicas there are.
        """
        left = 0
        for blocks in among:
            left |= blocks.bit
        found: dict[int, int] = {}
        cached, expected = self._cached, self._expected
        for depth, digest in enumerate(hashes):
            still = left & (cached.get(digest, 0) | expected.get(digest, 0))
            if still != left:
                if depth:
                    found.update(dict.fromkeys(_bits(left ^ still), depth))
                if not still:
                    return found
                left = still
        found.update(dict.fromkeys(_bits(left), len(hashes)))
        return found

    @property
    def size(self) -> int:
        """Different blocks in the index."""
        return len(self._cached.keys() | self._expected.keys())


class ReplicaBlocks:
    """One replica's part of a `PrefixIndex`; a `ullm.scheduling.block_pool.PoolListener` for its pool.

    Attributes:
        bit: stands for the replica.
    """

    def __init__(self, bit: int, cached: dict[bytes, int], expected: dict[bytes, int]) -> None:
        self.bit = bit
        self._cached = cached
        self._expected = expected
        self._own: set[bytes] = set()
        self._awaited: dict[bytes, int] = {}

    @property
    def count(self) -> int:
        """Blocks that its pool has cached."""
        return len(self._own)

    def published(self, digest: bytes) -> None:
        """Note a block that can be found from now on."""
        self._own.add(digest)
        self._cached[digest] = self._cached.get(digest, 0) | self.bit

    def evicted(self, digest: bytes) -> None:
        """Note a block whose space has gone to another one."""
        self._own.discard(digest)
        _unset(self._cached, digest, self.bit)

    def expect(self, hashes: Iterable[bytes]) -> None:
        """Note blocks that it is about to compute for a request; each call needs one of `expect_no_more`."""
        for digest in hashes:
            times = self._awaited.get(digest, 0)
            self._awaited[digest] = times + 1
            if not times:
                self._expected[digest] = self._expected.get(digest, 0) | self.bit

    def expect_no_more(self, hashes: Iterable[bytes]) -> None:
        """Note that the request has computed them, or never will."""
        for digest in hashes:
            times = self._awaited.get(digest, 0)
            if times > 1:
                self._awaited[digest] = times - 1
            elif times:
                del self._awaited[digest]
                _unset(self._expected, digest, self.bit)

    def clear(self) -> None:
        """Forget everything."""
        for digest in self._own:
            _unset(self._cached, digest, self.bit)
        for digest in self._awaited:
            _unset(self._expected, digest, self.bit)
        self._own.clear()
        self._awaited.clear()


def _unset(masks: dict[bytes, int], digest: bytes, bit: int) -> None:
    if left := masks.get(digest, 0) & ~bit:
        masks[digest] = left
    else:
        masks.pop(digest, None)


def _bits(mask: int) -> list[int]:
    """Return the single bits of a mask."""
    bits = []
    while mask:
        bit = mask & -mask
        bits.append(bit)
        mask ^= bit
    return bits
