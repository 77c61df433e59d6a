"""The block pool: holders, the prefix cache, and the order of eviction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullm.scheduling.block_pool import ROOT_HASH, BlockPool, block_hash


def test_blocks_are_handed_out_once() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    assert sorted(blocks) == [0, 1, 2, 3]
    assert pool.num_available == 0
    pool.check_integrity()


def test_a_released_block_is_handed_out_before_an_untouched_one() -> None:
    pool = BlockPool(8)
    (first,) = pool.allocate(1)
    pool.release([first])
    assert pool.allocate(1) == [first]


def test_a_published_block_is_found_after_its_release() -> None:
    pool = BlockPool(2)
    digest = block_hash(ROOT_HASH, [1, 2])
    (block,) = pool.allocate(1)
    pool.publish(block, digest)
    pool.release([block])
    assert pool.find([digest]) == [block]
    assert pool.num_available == 2
    pool.take([block])
    assert pool.num_available == 1
    pool.check_integrity()


def test_find_stops_at_the_first_unknown_hash() -> None:
    pool = BlockPool(3)
    hashes = [bytes([i]) * 16 for i in range(3)]
    blocks = pool.allocate(3)
    pool.publish(blocks[0], hashes[0])
    pool.publish(blocks[2], hashes[2])
    assert pool.find(hashes) == blocks[:1]


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3)
    hashes = [bytes([i]) * 16 for i in range(3)]
    blocks = pool.allocate(3)
    for block, digest in zip(blocks, hashes, strict=True):
        pool.publish(block, digest)
    pool.release(blocks)
    assert pool.allocate(1) == blocks[2:]
    assert pool.find(hashes) == blocks[:2]
    pool.check_integrity()


def test_free_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(2)
    cached, free = pool.allocate(2)
    pool.publish(cached, b"x" * 16)
    pool.release([cached, free])
    assert pool.allocate(1) == [free]
    assert pool.statistics().cached == 1


def test_the_first_of_two_equal_blocks_stays_known() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, b"x" * 16)
    pool.publish(second, b"x" * 16)
    assert pool.find([b"x" * 16]) == [first]
    pool.release([first, second])
    pool.check_integrity()


def test_a_block_held_twice_is_free_after_two_releases() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.publish(block, b"x" * 16)
    pool.take([block])
    pool.release([block])
    assert pool.num_available == 0
    assert pool.num_available_after_taking([block]) == 0
    pool.release([block])
    assert pool.num_available == 1
    assert pool.num_available_after_taking([block]) == 0


def test_a_hash_depends_on_tokens_and_on_all_before() -> None:
    first = block_hash(ROOT_HASH, [1, 2])
    assert first == block_hash(ROOT_HASH, [1, 2])
    assert len({first, block_hash(ROOT_HASH, [2, 1]), block_hash(first, [1, 2])}) == 3


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 9)), max_size=60))
def test_no_operations_lose_or_double_a_block(operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(6)
    held: list[list[int]] = []
    for number, (operation, value) in enumerate(operations):
        if operation == "allocate" and pool.num_available >= value:
            blocks = pool.allocate(value)
            for block in blocks[: value // 2]:
                pool.publish(block, number.to_bytes(8) + block.to_bytes(8))
            held.append(blocks)
        elif operation == "share" and held:
            blocks = held[value % len(held)]
            pool.take(blocks)
            held.append(list(blocks))
        elif operation == "release" and held:
            pool.release(held.pop(value % len(held)))
        pool.check_integrity()
    assert pool.statistics().used == len({block for blocks in held for block in blocks})


def test_the_integrity_check_sees_a_lost_block() -> None:
    pool = BlockPool(2)
    pool._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity()
