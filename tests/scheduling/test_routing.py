"""The choice of a replica: cached prefixes against load, sessions, breakers."""

from __future__ import annotations

import random

import pytest

from ullm.sampling import SamplingParams
from ullm.scheduling.block_pool import BlockPool, extend_hashes, root_hash
from ullm.scheduling.breaker import BREAK_AFTER, RELAPSE_SECONDS, Breaker
from ullm.scheduling.prefix_index import PrefixIndex, ReplicaBlocks
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.routing import LOAD_TOKENS, ReplicaLoad, Routing, RoutingPolicy

SIZE = 4


def record(number: int, prompt: list[int], *, session: str = "", salt: str | None = None) -> RequestRecord:
    params = SamplingParams(seed=0, cache_salt=salt)
    return RequestRecord(
        number, f"r{number}", prompt, params, 9999, number, lambda time: None, session=session
    )


def hashes_of(prompt: list[int]) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, prompt, SIZE, len(prompt) // SIZE, root_hash(None))
    return hashes


class Fleet:
    """Replicas that are up, and a routing that places requests on them."""

    def __init__(self, policy: RoutingPolicy, count: int, max_bs: int = 64) -> None:
        self.routing, self.now, self._numbers = Routing(policy), 1000.0, 0
        self.routing.block_size = SIZE
        self.replicas = [ReplicaLoad(index=index, max_bs=max_bs) for index in range(count)]
        for replica in self.replicas:
            replica.breaker.up(0.0)
            if self.routing.index is not None:
                replica.blocks = self.routing.index.join()

    def place(self, prompt: list[int], *, session: str = "", salt: str | None = None) -> int:
        """Place a request; return the number of its replica."""
        self._numbers += 1
        asked = record(self._numbers, prompt, session=session, salt=salt)
        chosen, cached = self.routing.choose(asked, self.replicas, self.now)
        chosen.add(asked, cached, SIZE)
        return chosen.index

    def cache(self, index: int, prompt: list[int]) -> None:
        """Have a replica's pool publish the blocks of a prompt."""
        blocks = self.replicas[index].blocks
        assert blocks is not None
        for digest in hashes_of(prompt):
            blocks.published(digest)

    def finish(self, index: int) -> None:
        for seq_id in list(self.replicas[index].requests):
            self.replicas[index].remove(seq_id)


def test_a_cached_prefix_attracts() -> None:
    fleet, prompt = Fleet("prefix", 3), list(range(400))
    fleet.cache(1, prompt)
    assert fleet.place(prompt) == 1
    assert fleet.place([*prompt, 1, 2, 3]) == 1
    assert fleet.routing.reasons == {"prefix": 2}


def test_the_longest_prefix_wins() -> None:
    fleet, prompt = Fleet("prefix", 3), list(range(400))
    fleet.cache(0, prompt[:100])
    fleet.cache(2, prompt[:300])
    assert fleet.place(prompt) == 2


def test_another_salt_finds_nothing() -> None:
    fleet, prompt = Fleet("prefix", 2), list(range(400))
    fleet.cache(1, prompt)
    assert fleet.place(prompt, salt="other") == 0
    assert fleet.routing.reasons == {"load": 1}


def test_load_outweighs_a_prefix_by_the_documented_cost() -> None:
    """With its prompt cached, a replica is preferred up to two neighbours per LOAD_TOKENS tokens."""
    fleet, prompt, neighbours = Fleet("prefix", 2), list(range(1, 2 * LOAD_TOKENS + 2)), 0
    fleet.cache(1, prompt)
    while fleet.place(prompt) == 1:
        neighbours += 1
        fleet.replicas[1].has_begun(neighbours)
        assert neighbours < 100
    assert neighbours == 4


def test_prefill_that_is_to_be_done_first_counts() -> None:
    fleet = Fleet("prefix", 2)
    assert fleet.place([7] * 1000) == 0  # a long prompt, of which nothing is cached
    assert [fleet.place([index] * 50) for index in range(5)] == [1] * 5


def test_blocks_that_a_replica_is_about_to_compute_attract_already() -> None:
    """Two requests with the same new prompt come at once: the prompt is computed once."""
    fleet, prompt = Fleet("prefix", 4), list(range(600))
    assert fleet.place(prompt) == fleet.place(prompt) == 0
    fleet.finish(0)  # before anything was published
    assert fleet.routing.index is not None
    assert fleet.routing.index.size == 0


def test_a_full_batch_comes_last() -> None:
    fleet, prompt = Fleet("prefix", 2, max_bs=1), list(range(4000))
    fleet.cache(0, prompt)
    assert fleet.place(prompt) == 0
    assert fleet.place(prompt) == 1


def test_an_idle_fleet_fills_all_of_its_caches() -> None:
    fleet, placed = Fleet("prefix", 4), []
    for start in range(0, 4000, 1000):
        prompt = list(range(start, start + 100))
        placed.append(fleet.place(prompt))
        fleet.cache(placed[-1], prompt)
        fleet.finish(placed[-1])
    assert sorted(placed) == [0, 1, 2, 3]


def test_the_least_loaded_replica() -> None:
    fleet = Fleet("least-loaded", 2)
    assert [fleet.place([1, 2, 3]) for _ in range(3)] == [0, 1, 0]
    fleet.finish(0)
    assert [fleet.place([1, 2, 3]) for _ in range(2)] == [0, 0]


def test_round_robin_goes_on_when_a_replica_is_gone() -> None:
    fleet = Fleet("round-robin", 3)
    assert [fleet.place([1]) for _ in range(4)] == [0, 1, 2, 0]
    del fleet.replicas[1]
    assert [fleet.place([1]) for _ in range(3)] == [2, 0, 2]


@pytest.mark.parametrize("policy", ["prefix", "least-loaded", "round-robin"])
def test_a_session_stays_until_its_replica_is_full_or_gone(policy: RoutingPolicy) -> None:
    fleet = Fleet(policy, 3, max_bs=3)
    first = fleet.place([1, 2, 3], session="s")
    assert [fleet.place([9], session="s") for _ in range(2)] == [first] * 2
    second = fleet.place([9], session="s")  # the batch is full
    assert second != first
    fleet.finish(first)
    assert fleet.place([9], session="s") == second
    fleet.replicas = [replica for replica in fleet.replicas if replica.index != second]
    third = fleet.place([9], session="s")
    assert third != second
    assert fleet.place([9], session="s") == third


def test_a_replica_on_trial_gets_one_request() -> None:
    fleet = Fleet("least-loaded", 2)
    breaker = fleet.replicas[0].breaker
    for _ in range(BREAK_AFTER):
        breaker.up(fleet.now)
        breaker.lost(fleet.now)
    breaker.up(fleet.now)
    assert [fleet.place([1]) for _ in range(4)] == [0, 1, 1, 1]
    breaker.served()
    assert [fleet.place([1]) for _ in range(2)] == [0, 0]


def test_where_all_are_on_trial_nobody_waits() -> None:
    fleet = Fleet("least-loaded", 1)
    for _ in range(BREAK_AFTER):
        fleet.replicas[0].breaker.lost(fleet.now)
        fleet.replicas[0].breaker.up(fleet.now)
    assert [fleet.place([1]) for _ in range(3)] == [0, 0, 0]


def test_the_states_of_a_breaker() -> None:
    breaker, now = Breaker(), 100.0
    assert breaker.state(now) == "open"
    breaker.up(now)
    breaker.lost(now + 1)
    assert breaker.state(now + 1) == "open"
    breaker.up(now + 2)
    assert breaker.state(now + 2) == "closed"  # one loss is a chance event
    breaker.lost(now + 3)
    breaker.up(now + 4)
    assert breaker.state(now + 5) == "half_open"
    assert breaker.state(now + 4 + RELAPSE_SECONDS) == "closed"
    breaker.lost(now + 4 + RELAPSE_SECONDS)  # after a life that was long enough
    breaker.up(now + 20)
    assert breaker.state(now + 20) == "closed"


def naive_depth(pool: BlockPool, hashes: list[bytes]) -> int:
    return len(pool.find(hashes))


@pytest.mark.parametrize("seed", range(5))
def test_the_index_agrees_with_the_pools(seed: int) -> None:
    """Pools publish, evict, and are lost at random: the index says of each what `BlockPool.find` says."""
    source, index = random.Random(seed), PrefixIndex()
    prompts = [hashes_of([source.randrange(2) for _ in range(SIZE * 8)]) for _ in range(12)]
    pools: list[tuple[BlockPool, ReplicaBlocks]] = []
    for _ in range(3):
        pools.append(joined(index))
    for _ in range(400):
        place = source.randrange(3)
        pool, blocks = pools[place]
        if source.random() < 0.02:
            index.leave(blocks)
            pools[place] = joined(index)
            continue
        hashes = source.choice(prompts)
        known = pool.find(hashes)
        if pool.num_available_after_taking(known) < len(hashes) - len(known):
            continue
        pool.take(known)
        held = known + pool.allocate(len(hashes) - len(known))
        for block, digest in zip(held, hashes, strict=True):
            pool.publish(block, digest)
        pool.release(held)
        asked = source.choice(prompts)
        found = index.depths(asked, [each for _, each in pools])
        assert {each.bit: found.get(each.bit, 0) for _, each in pools} == {
            each.bit: naive_depth(pool, asked) for pool, each in pools
        }
    for _, blocks in pools:
        index.leave(blocks)
    assert index.size == 0


def joined(index: PrefixIndex) -> tuple[BlockPool, ReplicaBlocks]:
    pool, blocks = BlockPool(24), index.join()
    pool.listener = blocks
    return pool, blocks
