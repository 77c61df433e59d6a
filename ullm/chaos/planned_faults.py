"""Faults of the server's own injection, armed while it runs; docs/how-to/fault-injection.md has the plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ullm.chaos.operation_faults import PATIENCE, has_route, operate
from ullm.chaos.verify import settle
from ullm.chaos.world import NOTHING, FaultKind, World

FAULTS = "/admin/faults"
LATEST_HIT = 10
"""A fault fires at one of this many next hits of its point."""
FIRES_WITHIN = 5.0
"""Seconds to wait until a fault at a step has fired."""
AT_STEPS = ("worker.step", "frame.", "scheduler.step")
"""Points that are hit all the time under load, and whose faults may end workers."""
HANGS = ("hang", "stop", "drop")
"""Actions after which a worker hangs, or seems to."""
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

    async def inject(self, world: World) -> str:
        """Arm the plan."""
        nth = world.source.randint(1, LATEST_HIT) if self.soon else 1
        armed = await arm(world, f"{self.plan}{',' if '@' in self.plan else '@'}nth={nth}")
        if armed and self.crashes:
            if not await settle(lambda: _happened(world), FIRES_WITHIN):
                await disarm(world)  # or it would hit requests for which no crash is counted
                return NOTHING
            if self.hangs:
                world.nursery.start_soon(world.note_hang)
            else:
                world.note_crash()  # only now is it known which requests it may have hit
        return armed


@dataclass(frozen=True)
class FailingReloadFault:
    """A reload that fails must leave the old workers in service."""

    name: str = "reload.fail"
    crashes: bool = False
    weight: float = 0.5

    async def offered(self, world: World) -> bool:
        """Return True if the admin listener both arms plans and reloads."""
        return await has_route(world, FAULTS) and await has_route(world, "/admin/reload")

    async def inject(self, world: World) -> str:
        """Arm the failure, and reload in the background."""
        armed = await arm(world, "engine.reload:raise")
        if armed:
            world.nursery.start_soon(_reload, world)
        return armed


async def arm(world: World, plan: str) -> str:
    """Arm a plan and return it; if the server refuses, record a violation and return `NOTHING`."""
    status, answer = await world.administer("POST", FAULTS, {"plan": plan})
    if status == 200:
        return plan
    world.violations.append(f"arming {plan}: {status} {answer}")
    return NOTHING


async def _happened(world: World) -> bool:
    status, report = await world.administer("GET", FAULTS)
    return status == 200 and not any(
        fault["remaining"] and fault["fault"].startswith(AT_STEPS) for fault in report["armed"]
    )


async def disarm(world: World) -> int:
    """Disarm all faults; return the number of those that had not fired."""
    status, answer = await world.administer("GET", FAULTS)
    if status != 200:
        return 0
    await world.administer("DELETE", FAULTS)
    report: dict[str, Any] = answer
    return sum(bool(fault["remaining"]) for fault in report["armed"])


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
