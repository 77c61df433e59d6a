"""Faults caused by clients that disconnect, read slowly or not at all, or arrive all at once."""

from __future__ import annotations

import random
from dataclasses import dataclass

import trio

from ullm.chaos.catalogue import ChaosRequest, long_request
from ullm.chaos.world import FaultKind, World

SLOWEST = 0.02
"""Maximum seconds between pieces; one read of a slow reader holds dozens, within the stall timeout."""


@dataclass(frozen=True)
class DisconnectFault:
    """A client hangs up in the middle of a stream, or while it waits for a unary answer."""

    name: str
    stream: bool
    crashes: bool = False
    weight: float = 1.5

    async def offered(self, world: World) -> bool:
        """Return True: every server has clients."""
        return True

    async def inject(self, world: World, source: random.Random) -> str:
        """Send a request in the background and hang up."""
        request = _choose(world, source, stream=self.stream)
        if self.stream:
            pieces = source.randint(1, 20)
            world.nursery.start_soon(lambda: world.send(request, leave_after=pieces))
            return f"request {request.number} left after {pieces} pieces"
        seconds = source.uniform(0.01, 0.5)
        world.nursery.start_soon(_cancel, world, request, seconds)
        return f"request {request.number} left after {seconds:.2f} s"


@dataclass(frozen=True)
class SlowReaderFault:
    """A client that reads slowly, and must get its whole text."""

    name: str = "client.slow"
    crashes: bool = False
    weight: float = 1.0

    async def offered(self, world: World) -> bool:
        """Return True: every server has clients."""
        return True

    async def inject(self, world: World, source: random.Random) -> str:
        """Read in the background; compare the answer at its end."""
        request, pause = _choose(world, source, stream=True), source.uniform(0.002, SLOWEST)
        world.nursery.start_soon(_read_slowly, world, request, pause)
        return f"request {request.number} waits {pause * 1000:.0f} ms after each piece"


@dataclass(frozen=True)
class StalledReaderFault:
    """A client that stops reading for longer than the stall timeout; its own stream may be aborted."""

    name: str = "client.stall"
    crashes: bool = False
    weight: float = 0.7

    async def offered(self, world: World) -> bool:
        """Return True: every server has clients."""
        return True

    async def inject(self, world: World, source: random.Random) -> str:
        """Stall in the background."""
        seconds, request = world.stall_timeout + 1, long_request(world.model, 1000)
        world.nursery.start_soon(lambda: world.send(request, stall_after=3, stall=seconds))
        return f"a long stream unread for {seconds:g} s"


@dataclass(frozen=True)
class BurstFault:
    """More requests at once than the queue holds; each is answered in full, or refused with Retry-After."""

    name: str = "burst"
    crashes: bool = False
    weight: float = 0.7

    async def offered(self, world: World) -> bool:
        """Return True: every server has clients."""
        return True

    async def inject(self, world: World, source: random.Random) -> str:
        """Send requests in the background."""
        count = int(world.room * source.uniform(1.2, 2))
        for _ in range(count):
            world.nursery.start_soon(_judged, world, source.choice(world.requests))
        return f"{count} requests at once"


KINDS: tuple[FaultKind, ...] = (
    DisconnectFault("client.disconnect", stream=True),
    DisconnectFault("client.cancel", stream=False),
    SlowReaderFault(),
    StalledReaderFault(),
    BurstFault(),
)


def _choose(world: World, source: random.Random, *, stream: bool) -> ChaosRequest:
    return source.choice([request for request in world.requests if request.stream is stream])


async def _cancel(world: World, request: ChaosRequest, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await world.send(request)


async def _read_slowly(world: World, request: ChaosRequest, pause: float) -> None:
    world.judge(await world.send(request, slow=pause))


async def _judged(world: World, request: ChaosRequest) -> None:
    world.judge(await world.send(request))
