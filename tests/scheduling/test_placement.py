"""Which host has which worker."""

from __future__ import annotations

import pytest

from ullm.config import EngineConfig
from ullm.scheduling.placement import place


def placed(nnodes: int, tp: int, pp: int = 1, replicas: int = 1) -> list[list[int]]:
    secret = {"node_secret_file": "x"} if nnodes > 1 else {}
    config = EngineConfig(
        nnodes=nnodes, tp_size=tp, pp_size=pp, replicas=replicas, transport="process", **secret
    )
    return [[place(config, slot, rank).node for rank in range(tp * pp)] for slot in range(replicas)]


@pytest.mark.parametrize(
    ("nnodes", "tp", "pp", "replicas", "nodes"),
    [
        (1, 2, 1, 2, [[0, 0], [0, 0]]),
        (2, 2, 1, 1, [[0, 1]]),
        (2, 2, 2, 1, [[0, 0, 1, 1]]),
        (2, 1, 1, 2, [[0], [1]]),
        (3, 2, 1, 3, [[0, 0], [1, 1], [2, 2]]),
        (2, 3, 1, 1, [[0, 0, 1]]),
        (3, 4, 1, 2, [[0, 0, 0, 1], [1, 1, 2, 2]]),
    ],
)
def test_ranks_are_given_out_in_order(
    nnodes: int, tp: int, pp: int, replicas: int, nodes: list[list[int]]
) -> None:
    assert placed(nnodes, tp, pp, replicas) == nodes


def test_numbers_on_a_host_begin_at_zero() -> None:
    config = EngineConfig(nnodes=3, tp_size=4, replicas=2, node_secret_file="x")
    numbers: dict[int, list[int]] = {}
    for slot in range(2):
        for rank in range(4):
            found = place(config, slot, rank)
            numbers.setdefault(found.node, []).append(found.local)
    assert numbers == {0: [0, 1, 2], 1: [0, 1, 2], 2: [0, 1]}


def test_stages_share_memory_if_each_is_on_one_host() -> None:
    config = EngineConfig(nnodes=2, tp_size=2, pp_size=2, node_secret_file="x")
    found = place(config, 0, 3)
    assert (found.shares_memory, found.alone, found.meets_on) == (True, False, 0)
    config = EngineConfig(nnodes=2, tp_size=4, node_secret_file="x")
    assert not place(config, 0, 0).shares_memory
    config = EngineConfig(nnodes=2, tp_size=2, replicas=2, node_secret_file="x")
    assert place(config, 1, 1).alone
    assert place(config, 1, 1).meets_on == 1
