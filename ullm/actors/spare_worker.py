"""What a pool of standby workers keeps: its spares, and the places where they are wanted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import trio

from ullm.actors.transports.base import Transport, WorkerSpec
from ullm.config import EngineConfig


class SpareTransport(Transport, Protocol):
    """A transport that can be given another name, because a spare takes the place of another worker."""

    name: str


@dataclass(frozen=True)
class Target:
    """What spares are prepared for, and the bytes of memory that a worker of it takes."""

    config: EngineConfig
    model_path: str
    need: int

    @property
    def spares(self) -> int:
        """How many for each worker."""
        return 1 if self.config.standby_workers is None else self.config.standby_workers


@dataclass(eq=False)
class Spare:
    """One spare worker; it belongs to the pool until it is taken.

    Attributes:
        target: what it is prepared for.
        born: in trio's time.
        transport: None until its process is started.
        leave: cancelled to make the pool let go of it: it is taken, or not wanted any more.
        released: whoever took it does not need it any more.
        gone: it has ended.
    """

    target: Target
    born: float
    transport: SpareTransport | None = None
    prepared: bool = False
    taken: bool = False
    leave: trio.CancelScope = field(default_factory=trio.CancelScope)
    released: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)

    @property
    def usable(self) -> bool:
        """Whether it would be ready at once."""
        transport = self.transport
        return transport is not None and self.prepared and transport.alive() and not transport.suspended()


@dataclass(eq=False)
class Place:
    """Where workers of one kind are wanted.

    Attributes:
        spec: of the last worker of this kind.
        serving: workers of this kind that are in use.
        not_before: when the next spare may be started, in trio's time.
        losses: spares lost in a row.
    """

    spec: WorkerSpec
    spares: list[Spare] = field(default_factory=list)
    serving: int = 0
    not_before: float = 0.0
    losses: int = 0


def kind_of(spec: WorkerSpec) -> tuple[object, ...]:
    """Workers of one kind can take each other's place."""
    rank = spec.rank
    return spec.runner, spec.cpu_threads, rank.rank, rank.world_size, rank.device_index
