"""The pool of KV blocks, with the prefix cache: blocks found again by a hash of their content."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from ullm.protocol.messages import Adapter
from ullm.sampling import SamplingParams

ROOT_HASH = b""
"""The parent hash of the first block of a sequence without a salt or an adapter."""


def root_hash(salt: str | None, adapter: int | None = None) -> bytes:
    """Return the parent hash of a sequence's first block: only sequences of the same root share blocks.

    Args:
        salt: the request's; None: it has none.
        adapter: number of the adapter that computes its keys and values; None: there is none.
    """
    if adapter is None:
        return ROOT_HASH if salt is None else blake2b(salt.encode(), digest_size=16).digest()
    text = f"{adapter}" if salt is None else f"{adapter}/{salt}"
    return blake2b(text.encode(), digest_size=16, person=b"adapter").digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the hash of a full block and of all blocks before it.

    The hash is cryptographic: with Python's own, a client could construct a prompt that reads another
    client's KV.
    """
    return blake2b(array("q", token_ids).tobytes(), digest_size=16, key=parent).digest()


class Rooted(Protocol):
    """What has KV blocks: a request's record, or a sequence in a scheduler."""

    params: SamplingParams
    adapter: Adapter | None


def root_of(owner: Rooted) -> bytes:
    """Return the root of a request's or sequence's blocks: everything that its keys and values depend on
    besides its tokens. The router and the schedulers must agree on it."""
    adapter = owner.adapter
    return root_hash(owner.params.cache_salt, None if adapter is None else adapter.number)


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], size: int, count: int, root: bytes) -> None:
    """Append the hashes of a sequence's blocks until there are ``count``.

    Args:
        size: tokens per block.
        root: see `root_of`.
    """
    for position in range(len(hashes), count):
        parent = hashes[-1] if hashes else root
        hashes.append(block_hash(parent, token_ids[position * size : (position + 1) * size]))


class PromptHashes:
    """Hashes of a prompt's full blocks, computed once for all choices of a request.

    Args:
        token_ids: the prompt.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids
        self._kind: tuple[int, bytes] | None = None
        self._hashes: list[bytes] = []

    def extend(self, hashes: list[bytes], size: int, count: int, root: bytes) -> None:
        """Append to ``hashes`` until there are ``count``, or all that the prompt has; see `extend_hashes`."""
        if self._kind != (size, root):  # another adapter of that name has been loaded since
            self._kind, self._hashes = (size, root), []
        count = min(count, len(self._token_ids) // size)
        extend_hashes(self._hashes, self._token_ids, size, count, root)
        hashes += self._hashes[len(hashes) : count]


class PoolListener(Protocol):
    """Is told which blocks can be found by their hash."""

    def published(self, digest: bytes) -> None:
        """A block can be found from now on."""

    def evicted(self, digest: bytes) -> None:
        """A block cannot be found any more."""


@dataclass(frozen=True)
class BlockStatistics:
    """Block counts of a pool.

    Args:
        total: blocks in the pool.
        used: blocks that sequences hold.
        cached: unused blocks whose content can still be found by hash.
    """

    total: int
    used: int
    cached: int


class BlockPool:
    """Allocates block numbers ``0 … num_blocks - 1`` and counts their holders.

    A released block that was published stays in the cache until its space is needed. Free blocks are
    allocated first, the last released one before others, so that a lightly used pool touches little memory;
    then cached ones, least recently used first.

    Attributes:
        listener: is told of every block that is published or evicted.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.listener: PoolListener | None = None
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can return, free and cached ones."""
        return len(self._free) + len(self._cached)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix of ``hashes``, without holding them."""
        blocks = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def knows(self, digest: bytes) -> bool:
        """Return whether a block can be found by this hash."""
        return digest in self._block_of

    def num_available_after_taking(self, blocks: Sequence[int]) -> int:
        """Return how many blocks would be available after `take` of ``blocks``."""
        return self.num_available - sum(1 for block in blocks if not self._holders[block])

    def take(self, blocks: Sequence[int]) -> None:
        """Hold blocks that `find` returned; other sequences may hold them, too."""
        for block in blocks:
            self._cached.pop(block, None)
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Return ``count`` blocks for new content. The caller has checked `num_available`."""
        return [self._allocate_one() for _ in range(count)]

    def _allocate_one(self) -> int:
        block = self._free.pop() if self._free else self._evict()
        self._holders[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        digest = self._hash_of.pop(block)
        del self._block_of[digest]
        if self.listener is not None:
            self.listener.evicted(digest)
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """Let later sequences find a held, full block. Of two equal blocks the first one stays known."""
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest
            if self.listener is not None:
                self.listener.published(digest)

    def release(self, blocks: Sequence[int]) -> None:
        """Release a sequence's blocks, given in the order of its positions.

        The last block is released first, so that beginnings, which more requests share, are evicted last.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def statistics(self) -> BlockStatistics:
        """Return the block counts as a frozen value."""
        return BlockStatistics(self.num_blocks, self.num_blocks - self.num_available, len(self._cached))

    def check_integrity(self) -> None:
        """Raise AssertionError unless each block is in exactly one place; for tests."""
        held = {block for block, holders in enumerate(self._holders) if holders > 0}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a free block is listed twice"
        assert len(held) + len(free) + len(cached) == self.num_blocks, "a block is lost or doubled"
        assert held | free | cached == set(range(self.num_blocks)), "a block is in two places"
        assert min(self._holders, default=0) >= 0, "a block was released more often than taken"
        assert {digest: block for block, digest in self._hash_of.items()} == self._block_of
        assert not free & set(self._hash_of), "a free block has a hash"
        assert cached <= set(self._hash_of), "a cached block has no hash"
