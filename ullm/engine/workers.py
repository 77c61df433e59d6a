"""What an engine starts its workers with: a transport, the pool of standby workers, other hosts."""

from __future__ import annotations

from collections.abc import Callable

from ullm.actors.standby_pool import StandbyPool
from ullm.actors.transports import OpenTransport, open_transport, ray_workers
from ullm.actors.transports.faulty import faulty
from ullm.config import EngineConfig
from ullm.engine.tree import OtherHosts
from ullm.errors import ConfigError
from ullm.faults import FaultInjector
from ullm.nodes.head import Nodes


def open_workers(
    config: EngineConfig,
    transport: OpenTransport | None,
    faults: FaultInjector,
    draining: Callable[[], bool],
) -> tuple[OpenTransport, StandbyPool | None, OtherHosts | None]:
    """Return what starts workers, and what it draws on, if there is such a thing.

    That is the pool of standby workers, and other hosts.

    Raises:
        ConfigError: the engine's own host is another one.
    """
    if config.node_rank > 0:
        raise ConfigError(
            f"--node-rank {config.node_rank}: the engine is on the host of --node-rank 0; run ullm serve here"
        )
    standby = None
    if transport is None and config.worker_transport == "ray":
        cluster = ray_workers()
        return faulty(cluster.open, faults), None, cluster
    if transport is None:
        transport = open_transport(config.worker_transport)
        standby = StandbyPool(transport) if config.worker_transport == "process" else None
    workers = standby.open if standby is not None else transport
    nodes = Nodes(config, workers, draining) if config.nnodes > 1 else None
    return faulty(workers if nodes is None else nodes.open, faults), standby, nodes
