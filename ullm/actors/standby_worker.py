"""The values that the pool of standby workers keeps: standbys, and the kinds of workers they can replace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import trio

from ullm.actors.transports.base import Transport, WorkerSpec
from ullm.config import EngineConfig


class StandbyTransport(Transport, Protocol):
    """A transport that can be given another name, because a standby replaces a worker that had one."""

    name: str


@dataclass(frozen=True)
class StandbyTarget:
    """What standbys are prepared for.

    Args:
        need: bytes of memory that a worker takes for weights.
    """

    config: EngineConfig
    model_path: str
    need: int

    @property
    def standbys(self) -> int:
        """Standby workers for each worker."""
        return 1 if self.config.standby_workers is None else self.config.standby_workers


@dataclass(eq=False)
class StandbyWorker:
    """One standby worker; it belongs to the pool until it is taken.

    Attributes:
        target: what it is prepared for.
        born: trio's time when it was created.
        transport: None until its process is started.
        leave: cancelled when it is taken, or no longer wanted.
        released: set when the worker group that took it is done with it.
        gone: set when it has ended.
    """

    target: StandbyTarget
    born: float
    transport: StandbyTransport | None = None
    prepared: bool = False
    taken: bool = False
    leave: trio.CancelScope = field(default_factory=trio.CancelScope)
    released: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)

    @property
    def usable(self) -> bool:
        """Whether it can replace a worker at once."""
        transport = self.transport
        return transport is not None and self.prepared and transport.alive() and not transport.suspended()


@dataclass(eq=False)
class WorkerKind:
    """Workers that can replace each other, and the standbys for them.

    Attributes:
        spec: specification of the latest worker of this kind.
        serving: workers of this kind that are in use.
        not_before: trio's time before which no further standby is started.
        losses: standbys lost in a row.
    """

    spec: WorkerSpec
    standbys: list[StandbyWorker] = field(default_factory=list)
    serving: int = 0
    not_before: float = 0.0
    losses: int = 0


def kind_of(spec: WorkerSpec) -> tuple[object, ...]:
    """Return the key of a worker's kind: workers with equal keys can replace each other."""
    rank = spec.rank
    place = rank.rank, rank.world_size, rank.num_stages, rank.device_index
    return spec.runner, spec.cpu_threads, spec.node, spec.interface, *place
