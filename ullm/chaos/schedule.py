"""What a run will do, as plain values drawn from its seed: which faults, together or alone, and the pauses.

Each moment and each fault has a generator of its own, named by seed and number. So a fault that finds nothing
to act on, or draws more than it used to, moves no later one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

BURST_SIZE = (2, 3)
"""Minimum and maximum of faults that come at once."""


class Weighted(Protocol):
    """What can be drawn; see `ullm.chaos.world.FaultKind`."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...


class Draw(msgspec.Struct, frozen=True):
    """One fault to be injected.

    Args:
        key: names the generator from which it draws what remains to be decided.
    """

    kind: str
    key: str

    def source(self) -> random.Random:
        """Return its generator."""
        return random.Random(self.key)


class Moment(msgspec.Struct, frozen=True):
    """Faults that come at once, and the pause after them.

    Args:
        pause: seconds.
    """

    number: int
    faults: list[Draw]
    pause: float


def moments(
    seed: int, kinds: Sequence[Weighted], bursts: float, pause: float, first: int = 1
) -> Iterator[Moment]:
    """Yield the moments of a seed, without end.

    Args:
        bursts: share of the moments with several faults.
        pause: maximum of the pauses, in seconds.
        first: number of the first one.
    """
    for number in itertools.count(first):
        source = random.Random(f"moment {number} of seed {seed}")
        count = source.randint(*BURST_SIZE) if source.random() < bursts else 1
        drawn = source.choices(kinds, [kind.weight for kind in kinds], k=count)
        faults = [
            Draw(kind.name, f"fault {number}.{place} of seed {seed}") for place, kind in enumerate(drawn, 1)
        ]
        yield Moment(number, faults, round(source.uniform(0, pause), 3))
