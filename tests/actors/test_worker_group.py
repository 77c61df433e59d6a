"""Where the ranks of a worker group meet."""

from __future__ import annotations

from ullm.actors.worker_group import RENDEZVOUS_ROUNDS, rendezvous_port
from ullm.config import EngineConfig


def test_rendezvous_ports_are_in_a_bounded_range_and_not_shared() -> None:
    config = EngineConfig(replicas=3, nccl_port=30_000)
    ports = {
        (slot, epoch): rendezvous_port(config, slot, epoch)
        for slot in range(config.replicas)
        for epoch in range(1, 1 + RENDEZVOUS_ROUNDS)
    }
    assert set(ports.values()) == set(range(30_000, 30_000 + 3 * RENDEZVOUS_ROUNDS))
    assert len(set(ports.values())) == len(ports)
    assert rendezvous_port(config, 1, 1 + RENDEZVOUS_ROUNDS) == ports[1, 1]
