"""Operations as faults: sleep, wake and reload at any moment, under load."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import trio

from ullm.chaos.world import FaultKind, World

BUSY = (409, 503)
"""Statuses that say that another operation was first."""
FAILED = 500
"""Status of a reload whose new workers crashed while they started; the old ones stay in service."""
KEPT = 0.3
"""Seconds for which requests in flight are kept during a sleep."""
PATIENCE = 60.0
"""Seconds that an operation may take, crashes included."""


@dataclass(frozen=True)
class SleepFault:
    """Fall asleep; the next request wakes the engine up.

    Args:
        mode: treatment of requests in flight; ``abort`` ends them with the text they have.
    """

    name: str
    level: int
    mode: str
    crashes: bool = False
    weight: float = 0.5

    async def offered(self, world: World) -> bool:
        """Return True if the admin listener has the route."""
        return await has_route(world, "/sleep")

    async def inject(self, world: World, source: random.Random) -> str:
        """Request it in the background."""
        world.nursery.start_soon(self._sleep, world)
        return f"level {self.level}, mode {self.mode}"

    async def _sleep(self, world: World) -> None:
        body = {"level": self.level, "mode": self.mode}
        with world.may_abort() if self.mode == "abort" else nullcontext():
            await operate(world, "/sleep", body, (200, *BUSY), PATIENCE)
        if self.mode == "keep":  # if all clients wait for what was kept, no new request wakes it
            await trio.sleep(KEPT)
            await operate(world, "/wake", None, (200, *BUSY), PATIENCE)


@dataclass(frozen=True)
class WakeFault:
    """Wake the engine, even if it is awake."""

    name: str = "wake"
    crashes: bool = False
    weight: float = 0.7

    async def offered(self, world: World) -> bool:
        """Return True if the admin listener has the route."""
        return await has_route(world, "/wake")

    async def inject(self, world: World, source: random.Random) -> str:
        """Request it in the background."""
        world.nursery.start_soon(operate, world, "/wake", None, (200, *BUSY), PATIENCE)
        return "wake"


@dataclass(frozen=True)
class ReloadFault:
    """Reload: a new group of workers takes over."""

    name: str = "reload"
    crashes: bool = False
    weight: float = 1.0

    async def offered(self, world: World) -> bool:
        """Return True if the admin listener has the route."""
        return await has_route(world, "/admin/reload")

    async def inject(self, world: World, source: random.Random) -> str:
        """Request it in the background."""
        world.nursery.start_soon(operate, world, "/admin/reload", {}, (200, *BUSY, FAILED), PATIENCE)
        return "reload"


KINDS: tuple[FaultKind, ...] = (
    *(SleepFault(f"sleep.{mode}{level}", level, mode) for level in range(4) for mode in ("wait", "keep")),
    SleepFault("sleep.abort1", 1, "abort"),
    WakeFault(),
    ReloadFault(),
)


async def operate(world: World, path: str, body: Any, allowed: Sequence[int], seconds: float) -> None:
    """POST to the admin listener; record a violation if the status is not ``allowed``, or late."""
    status, answer = await world.administer("POST", path, body, seconds)
    if status not in allowed:
        world.violations.append(f"POST {path} {body}: {status} {answer}")


async def has_route(world: World, path: str) -> bool:
    """Return True if the admin listener has a path; one for POST only refuses GET with 405."""
    status, _ = await world.administer("GET", path)
    return status not in (0, 404)
