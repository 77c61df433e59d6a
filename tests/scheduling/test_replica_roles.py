"""Where requests go with replicas for prefill and for decode, and where they move on."""

from __future__ import annotations

import pytest

from ullm.config import Role
from ullm.sampling import SamplingParams
from ullm.scheduling.block_pool import extend_hashes, root_hash
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.routing import ReplicaLoad, Routing, RoutingPolicy

SIZE, THRESHOLD, NOW = 4, 40, 1000.0
LONG, SHORT = list(range(60)), list(range(100, 120))


def record(prompt: list[int], **params: int) -> RequestRecord:
    """A request."""
    given = SamplingParams(seed=0, **params)  # type: ignore[arg-type]
    return RequestRecord(1, "r1", prompt, given, 9999, 1, lambda time: None)


class Fleet:
    """Replicas with these roles, all of them up and idle."""

    def __init__(self, *roles: Role, policy: RoutingPolicy = "prefix") -> None:
        self.routing = Routing(policy, THRESHOLD)
        self.routing.block_size = SIZE
        self.replicas = [ReplicaLoad(index=index, max_bs=2, role=role) for index, role in enumerate(roles)]
        for replica in self.replicas:
            replica.breaker.up(0.0)
            if self.routing.index is not None:
                replica.blocks = self.routing.index.join()

    def place(self, prompt: list[int], **params: int) -> int:
        """Return where a request would go."""
        chosen, _ = self.routing.choose(record(prompt, **params), self.replicas, NOW)
        return chosen.index

    def next_home(self) -> int | None:
        """Return where a long request would move on."""
        found = self.routing.next_home(record(LONG), self.replicas, NOW)
        return None if found is None else found.index

    def cache(self, index: int, prompt: list[int]) -> None:
        """Have a replica have the blocks of a prompt."""
        hashes: list[bytes] = []
        extend_hashes(hashes, prompt, SIZE, len(prompt) // SIZE, root_hash(None))
        blocks = self.replicas[index].blocks
        assert blocks is not None
        for digest in hashes:
            blocks.published(digest)

    def fill(self, index: int) -> None:
        """Give a replica as many requests as fit into its batch."""
        for _ in range(2):
            self.replicas[index].requests[-len(self.replicas[index].requests) - 1] = record(SHORT)


@pytest.mark.parametrize("policy", ["prefix", "least-loaded", "round-robin"])
def test_long_prompts_and_short_ones_part(policy: RoutingPolicy) -> None:
    fleet = Fleet("decode", "prefill", policy=policy)
    assert (fleet.place(LONG), fleet.place(SHORT)) == (1, 0)
    assert (fleet.place(LONG[:THRESHOLD]), fleet.place(LONG[: THRESHOLD - 1])) == (1, 0)


def test_what_is_cached_where_it_decodes_need_not_be_computed() -> None:
    fleet = Fleet("prefill", "decode", "decode")
    fleet.cache(0, LONG)  # of no use: it would have to move
    assert fleet.place(LONG) == 0
    fleet.cache(2, LONG[:20])
    assert fleet.place(LONG) == 0  # forty are left
    fleet.cache(2, LONG[:24])
    assert fleet.place(LONG) == 2


def test_a_replica_for_both_takes_either() -> None:
    fleet = Fleet("both", "decode")
    assert fleet.place(LONG) == 0
    fleet.fill(0)
    assert fleet.place(LONG) == 0  # it waits for the only one that is for it
    assert fleet.place(SHORT) == 1


def test_where_nobody_has_the_role_all_may() -> None:
    assert Fleet("decode").place(LONG) == 0
    assert Fleet("prefill").place(SHORT) == 0


def test_what_cannot_use_a_cache_would_be_computed_twice() -> None:
    assert Fleet("prefill", "decode").place(LONG, prompt_logprobs=1) == 1


def test_a_request_moves_to_who_decodes_and_has_room() -> None:
    fleet = Fleet("prefill", "decode", "decode", "both")
    fleet.cache(2, LONG)
    assert fleet.next_home() == 2
    fleet.fill(2)
    assert fleet.next_home() == 1
    fleet.fill(1)
    assert fleet.next_home() == 3
    fleet.fill(3)
    assert fleet.next_home() is None


def test_it_does_not_move_to_who_runs_a_suspect_or_is_on_trial() -> None:
    fleet = Fleet("decode")
    suspect = record(SHORT)
    suspect.crashes = 2
    fleet.replicas[0].requests[7] = suspect
    assert fleet.next_home() is None
    fleet.replicas[0].requests.clear()
    assert fleet.next_home() == 0
    fleet.replicas[0].breaker.lost(NOW)
    assert fleet.next_home() is None
