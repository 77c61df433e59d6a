"""Faults of the processes of ``--api-server-count``: an engine or a front end that dies or pauses."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any

import trio

from ullm.chaos.verify import settle
from ullm.chaos.world import ENGINE, FRONT_END, NOTHING, FaultKind, World
from ullm.testing.processes import psutil_module

BACK_WITHIN = 60.0
"""Seconds within which there is an engine again after one was killed, and it is ready."""
WHOLE_WITHIN = 30.0
"""Seconds to wait before a kill until those who were killed before are replaced."""
LINK = "ullm-"
"""Part of the name of the socket at which an engine listens for the front ends of its launcher, and of those
that it has accepted there."""

FOUND_WITHIN = 5.0
"""Seconds after that within which front ends have found it."""


@dataclass(frozen=True)
class PartKillFault:
    """SIGKILL for the engine, whose streams go on, or for a front end, whose own connections end."""

    name: str
    part: str
    crashes: bool = False
    weight: float = 2.0

    async def offered(self, world: World) -> bool:
        """Return True if the server is made of such processes."""
        return bool(world.parts(self.part))

    async def inject(self, world: World, source: random.Random) -> str:
        """Kill one, when all are there again; what it held is noted first, while it is suspended."""
        drawn = source.random()

        async def is_whole() -> bool:
            return _is_whole(world)

        if not await settle(is_whole, WHOLE_WITHIN):
            return NOTHING
        process = _choose(world, self.part, random.Random(drawn))
        if process is None:
            return NOTHING
        try:
            process.suspend()
            ports = {each.raddr.port for each in process.net_connections("tcp") if each.raddr}
        except psutil_module().Error:
            return NOTHING
        world.killed[self.part] += 1
        if self.part == ENGINE:
            world.engine_away = True
            world.nursery.start_soon(_comes_back, world, process)
        else:
            world.broken |= dict.fromkeys(ports, trio.current_time())
        process.kill()
        return f"SIGKILL to {self.part} {process.pid} with {len(ports)} connections"


@dataclass(frozen=True)
class PartPauseFault:
    """SIGSTOP for an engine or a front end, and SIGCONT before it counts as hung."""

    name: str
    part: str
    crashes: bool = False
    weight: float = 1.0

    async def offered(self, world: World) -> bool:
        """Return True if the server is made of such processes."""
        return bool(world.parts(self.part))

    async def inject(self, world: World, source: random.Random) -> str:
        """Suspend one, and resume it in the background."""
        process, seconds = _choose(world, self.part, source), source.uniform(0.1, 0.8)
        if process is None:
            return NOTHING
        try:
            process.suspend()
        except psutil_module().Error:
            return NOTHING
        world.nursery.start_soon(_resume, process, seconds)
        return f"SIGSTOP to {self.part} {process.pid} for {seconds:.2f} s"


def _kinds() -> tuple[FaultKind, ...]:
    if sys.platform == "win32":  # which has no launcher
        return ()
    return (
        PartKillFault("part.engine-kill", ENGINE),
        PartKillFault("part.front-end-kill", FRONT_END),
        PartPauseFault("part.engine-pause", ENGINE),
        PartPauseFault("part.front-end-pause", FRONT_END),
    )


KINDS = _kinds()


def _choose(world: World, part: str, source: random.Random) -> Any | None:
    """Return one of the parts of a kind, by number of its name; None if none of them runs."""
    names = world.parts(part)
    return names[source.choice(sorted(names))] if names else None


def links(world: World) -> int:
    """Return how many sockets a launcher's engine has for its front ends, those included that listen."""
    try:
        engines = world.parts(ENGINE).values()
        sockets = [each for engine in engines for each in engine.net_connections("unix")]
    except psutil_module().Error:
        return 0
    return sum(LINK in str(each.laddr) for each in sockets)


def _is_whole(world: World) -> bool:
    """Return whether the engine runs, and as many front ends as at the start are connected to it."""
    return not world.engine_away and links(world) == world.links


async def _comes_back(world: World, killed: Any) -> None:
    """Record a violation if there is no other engine; until there is one, it may not answer."""

    async def answers() -> bool:
        engines = world.parts(ENGINE).values()
        is_another = any(each.pid != killed.pid for each in engines)
        return is_another and (await world.call(world.admin, "GET", "/ready"))[0] == 200

    if not await settle(answers, BACK_WITHIN):
        world.violations.append(f"no engine answers {BACK_WITHIN:g} s after one was killed")
    world.engine_away, world.away_until = False, trio.current_time() + FOUND_WITHIN


async def _resume(process: Any, seconds: float) -> None:
    await trio.sleep(seconds)
    try:
        process.resume()
    except psutil_module().NoSuchProcess:
        return
