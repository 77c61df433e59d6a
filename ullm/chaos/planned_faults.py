"""Faults of the server's own injection, armed while it runs; docs/how-to/fault-injection.md has the plans."""

from __future__ import annotations

import random
from dataclasses import dataclass

import msgspec

from ullm.chaos.operation_faults import PATIENCE, has_route, operate
from ullm.chaos.verify import settle
from ullm.chaos.world import AWAY, NOTHING, FaultKind, World
from ullm.faults import FaultReport

FAULTS = "/admin/faults"
LATEST_HIT = 10
"""A fault fires at one of this many next hits of its point."""
FIRES_WITHIN = 5.0
"""Seconds to wait until a fault at a step has fired."""
HANGS = ("hang", "stop", "drop")
"""Actions after which a worker hangs, or seems to."""
SEEN_WITHIN = 10.0
"""Seconds after the last request within which everything that was fired must have had its effect."""
ENDING = ("crash", "exit", "raise", "oom")
"""Actions that end whoever carries them out."""
REFUSED = (400, 409, 500, 503)
"""Statuses of an operation that is made to fail."""


@dataclass(frozen=True)
class PlannedFault:
    """A fault at a named point of the server.

    Args:
        plan: without ``nth``, which is drawn.
        hangs: True if the worker is lost only when the hang is detected.
        soon: True if its point is hit all the time under load, so that ``nth`` may be drawn.
    """

    name: str
    plan: str
    crashes: bool = False
    hangs: bool = False
    soon: bool = True
    weight: float = 0.5

    async def offered(self, world: World) -> bool:
        """Return True if the admin listener arms plans."""
        return await has_route(world, FAULTS)

    async def inject(self, world: World, source: random.Random) -> str:
        """Arm the plan."""
        nth = source.randint(1, LATEST_HIT) if self.soon else 1
        plan = f"{self.plan}{',' if '@' in self.plan else '@'}nth={nth}"
        number = await arm(world, plan)
        if number is None:
            return NOTHING
        if self.crashes:
            if not await settle(lambda: _happened(world, number), FIRES_WITHIN):
                await disarm(world)  # or it would hit requests for which no crash is counted
                if not await _happened(world, number):
                    return NOTHING
            if self.hangs:
                world.nursery.start_soon(world.note_hang)
            else:
                world.note_crash()  # only now is it known which requests it may have hit
        return plan


@dataclass(frozen=True)
class FailingReloadFault:
    """A reload that fails must leave the old workers in service."""

    name: str = "reload.fail"
    crashes: bool = False
    weight: float = 0.5

    async def offered(self, world: World) -> bool:
        """Return True if the admin listener both arms plans and reloads."""
        return await has_route(world, FAULTS) and await has_route(world, "/admin/reload")

    async def inject(self, world: World, source: random.Random) -> str:
        """Arm the failure, and reload in the background."""
        plan = "engine.reload:raise"
        if await arm(world, plan) is None:
            return NOTHING
        world.nursery.start_soon(_reload, world)
        return plan


async def arm(world: World, plan: str) -> int | None:
    """Arm a fault and return its number; if the server refuses, record a violation and return None."""
    status, answer = await world.administer("POST", FAULTS, {"plan": plan})
    if status == 200:
        number: int = answer["armed"][-1]["number"]
        world.armed[number] = plan
        return number
    if status != AWAY:
        world.violations.append(f"arming {plan}: {status} {answer}")
    return None


async def _happened(world: World, number: int) -> bool:
    """Return whether this fault has fired; others that are armed in the same moment do not count."""
    return any(fired.number == number for fired in (await report_of(world)).fired)


async def disarm(world: World) -> int:
    """Disarm all faults; return the number of those that had not fired."""
    report = await report_of(world)
    await world.administer("DELETE", FAULTS)
    return sum(bool(fault.remaining) for fault in report.armed)


async def report_of(world: World) -> FaultReport:
    """Return what is armed in the server and what has fired; nothing if it does not answer."""
    status, answer = await world.administer("GET", FAULTS)
    return msgspec.convert(answer, FaultReport) if status == 200 else FaultReport([], [])


async def judge_effects(world: World) -> None:
    """Demand that everything that was fired has had its effect, which takes as long as a hang may last.

    A worker that a fault ends is seen to end, and some successor to come; an actor raises, and comes again.
    """

    async def all_seen() -> bool:
        world.fired = [fired for fired in (await report_of(world)).fired if fired.number in world.armed]
        return all(fired.effect for fired in world.fired)

    if not await settle(all_seen, SEEN_WITHIN):
        world.violations += [
            f"{world.armed[fired.number]} fired at hit {fired.hit} of {fired.point} and had no effect"
            for fired in world.fired
            if not fired.effect
        ]
    lost = [fired for fired in world.fired if fired.effect and fired.action in ENDING]
    if lost and all(fired.recovered is None for fired in lost):
        world.violations.append(f"{len(lost)} faults ended a worker or an actor, and none was seen again")


async def _reload(world: World) -> None:
    await operate(world, "/admin/reload", {}, (200, *REFUSED), PATIENCE)


KINDS: tuple[FaultKind, ...] = (
    *(
        PlannedFault(f"plan.step-{action}", f"worker.step:{action}", True, action in HANGS)
        for action in ("crash", "exit", "raise", "oom", "hang", "stop")
    ),
    PlannedFault("plan.step-slow", "worker.step:slow@seconds=0.3"),
    PlannedFault("plan.start-crash", "worker.start:crash", soon=False),
    PlannedFault("plan.start-raise", "worker.start:raise", soon=False),
    PlannedFault("plan.prepare-crash", "worker.prepare:crash", soon=False),
    PlannedFault("plan.sleep-crash", "worker.sleep:crash", soon=False),
    PlannedFault("plan.sleep-raise", "worker.sleep:raise", soon=False),
    PlannedFault("plan.wake-crash", "worker.wake:crash", soon=False),
    PlannedFault("plan.wake-raise", "worker.wake:raise", soon=False),
    *(
        PlannedFault(f"plan.step-{action}", f"frame.to_worker:{action}@message=Step", True, action in HANGS)
        for action in ("drop", "duplicate", "corrupt")
    ),
    *(
        PlannedFault(
            f"plan.result-{action}", f"frame.from_worker:{action}@message=StepResult", True, action in HANGS
        )
        for action in ("drop", "duplicate", "corrupt")
    ),
    PlannedFault("plan.step-delay", "frame.to_worker:delay@message=Step,seconds=0.2"),
    PlannedFault("plan.result-delay", "frame.from_worker:delay@message=StepResult,seconds=0.2"),
    # A fault that ends a scheduler counts against the requests in its step, like the loss of a worker.
    PlannedFault("plan.scheduler-raise", "scheduler.step:raise", crashes=True),
    PlannedFault("plan.router-raise", "router.tokens:raise"),
    PlannedFault("plan.tokenizer-raise", "tokenizer.encode:raise"),
    *(
        PlannedFault(f"plan.{actor}-{action}", f"{point}:{action}@seconds={seconds}")
        for actor, point in (
            ("scheduler", "scheduler.step"),
            ("router", "router.tokens"),
            ("tokenizer", "tokenizer.encode"),
        )
        for action, seconds in (("slow", 0.2), ("hang", 0.5), ("block", 0.2))
    ),
    FailingReloadFault(),
)
