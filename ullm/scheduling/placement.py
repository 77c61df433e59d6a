"""Which host has which worker: all ranks of all replicas in order, given out evenly to the hosts in order."""

from __future__ import annotations

from dataclasses import dataclass

from ullm.config import EngineConfig


@dataclass(frozen=True)
class Placement:
    """Where one rank runs.

    Args:
        node: index of its host; 0 is the engine's own.
        meets_on: the host of its replica's first rank, where the ranks meet.
        local: its number among the workers of its host.
        shares_memory: whether all ranks of each stage of its replica are on one host.
        alone: whether all ranks of its replica are on one host.
    """

    node: int
    meets_on: int
    local: int
    shares_memory: bool
    alone: bool


def place(config: EngineConfig, slot: int, rank: int) -> Placement:
    """Return where a rank of the replica in a slot runs."""
    size = config.world_size
    nodes = [node_of(config, slot * size + each) for each in range(size)]
    stages = [nodes[first : first + config.tp_size] for first in range(0, size, config.tp_size)]
    node = nodes[rank]
    return Placement(
        node=node,
        meets_on=nodes[0],
        local=slot * size + rank - first_on(config, node),
        shares_memory=all(len(set(stage)) == 1 for stage in stages),
        alone=len(set(nodes)) == 1,
    )


def node_of(config: EngineConfig, index: int) -> int:
    """Return the host of a worker, whose index counts all ranks of all replicas."""
    return index * config.nnodes // (config.world_size * config.replicas)


def first_on(config: EngineConfig, node: int) -> int:
    """Return the index of the first worker on a host."""
    return -(-node * config.world_size * config.replicas // config.nnodes)
