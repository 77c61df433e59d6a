"""Faults by operators: sleep, wake, reload, at any moment and under load."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import trio

from ullm.chaos.world import FaultKind, World

BUSY = (409, 503)
"""Answers that say that another operation has come first."""
FAILED = 500
"""A reload answers so when a crash kept the new workers from coming up; the old ones serve on."""
KEPT = 0.3
"""Seconds for which requests in flight are kept."""
PATIENCE = 60.0
"""Seconds that an operation may take, with crashes in its way."""


@dataclass(frozen=True)
class SleepFault:
    """Fall asleep; the next request wakes the engine up.

    Args:
        mode: what becomes of requests in flight; ``abort`` ends them with what they have.
    """

    name: str
    level: int
    mode: str
    crashes: bool = False
    weight: float = 0.5

    async def offered(self, world: World) -> bool:
        """Where the admin listener has it."""
        return await has_route(world, "/sleep")

    async def inject(self, world: World) -> str:
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
        """Where the admin listener has it."""
        return await has_route(world, "/wake")

    async def inject(self, world: World) -> str:
        """Request it in the background."""
        world.nursery.start_soon(operate, world, "/wake", None, (200, *BUSY), PATIENCE)
        return "wake"


@dataclass(frozen=True)
class ReloadFault:
    """A new group of workers takes over."""

    name: str = "reload"
    crashes: bool = False
    weight: float = 1.0

    async def offered(self, world: World) -> bool:
        """Where the admin listener has it."""
        return await has_route(world, "/admin/reload")

    async def inject(self, world: World) -> str:
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
    """POST to the admin listener; a status that is not ``allowed``, or none in time, is a violation."""
    status, answer = await world.administer("POST", path, body, seconds)
    if status not in allowed:
        world.violations.append(f"POST {path} {body}: {status} {answer}")


async def has_route(world: World, path: str) -> bool:
    """Whether the admin listener knows a path: one that takes only POST refuses GET with 405."""
    status, _ = await world.administer("GET", path)
    return status not in (0, 404)
