"""A chaos run: a server, its clients, faults drawn from a seed, and the verdicts."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from ullm.chaos import part_faults, planned_faults
from ullm.chaos.catalogue import ChaosRequest, catalogue
from ullm.chaos.chaos_plan import ROOM, ChaosPlan, all_kinds, chosen_kinds, with_model
from ullm.chaos.chaos_report import ChaosReport
from ullm.chaos.load_verdicts import load_verdicts
from ullm.chaos.schedule import Draw, Moment, moments
from ullm.chaos.verify import (
    Footprint,
    after_stop,
    at_rest,
    leaving_is_noticed,
    log_verdict,
    parts_verdict,
    rest,
    settle,
    shared_memory,
)
from ullm.chaos.world import MAX_CRASHES, NOTHING, FaultKind, InjectedFault, World
from ullm.client.completions import first_model
from ullm.client.http import Endpoint
from ullm.errors import ResourceUnavailable
from ullm.testing.processes import free_port, open_server

START_SECONDS = 120.0
REFERENCE_ROUNDS = 2
"""Number of times that each request is sent before the faults; all answers must agree."""
WARM_SHARE = 0.3
"""Share of the faults after which the server's memory counts as warmed up."""
SPARED = 20.0
"""Seconds to wait until requests that have seen `MAX_CRASHES` are finished."""
TELL_EVERY = 0.5
"""Seconds between two reports of the progress."""

Tell = Callable[[str, World], None]
"""Is told now and then what a run is at."""


def tell_nobody(stage: str, world: World) -> None:
    """Tell nobody."""


async def run_chaos(
    plan: ChaosPlan, folder: Path, *, replay: Sequence[Moment] = (), tell: Tell = tell_nobody
) -> ChaosReport:
    """Start a server, inject faults, judge it, stop it.

    Args:
        folder: holds the model, the server's log, its temporary files and a socket, for which the path must
            be short.
        replay: moments of an earlier run; those that the seed draws follow.
        tell: is told about the progress.

    Raises:
        ResourceUnavailable, ServerEnded: the server does not start.
    """
    temporary = folder / "tmp"
    temporary.mkdir()
    shared = shared_memory()
    async with open_world(with_model(plan, folder / "model"), folder, temporary) as world:
        tell("asking without faults", world)
        await record_expected(world)
        before, parts = await rest(world), world.parts()
        world.links = part_faults.links(world)
        kinds = [kind for kind in chosen_kinds(plan.only) if await kind.offered(world)]
        coming = itertools.chain(replay, moments(plan.seed, kinds, plan.bursts, plan.pause, len(replay) + 1))
        undisturbed = world.counts["answered"]
        warm = await disturb(world, plan, coming, tell) or before
        answered = world.counts["answered"] - undisturbed
        tell("asking once more", world)
        unfired = await planned_faults.disarm(world)
        await ask_once_more(world)
        await planned_faults.judge_effects(world)
        verdicts = [await leaving_is_noticed(world), *await at_rest(world, before, warm)]
        tell("stopping the server", world)
        verdicts += await after_stop(world, temporary, shared)
        world.nursery.cancel_scope.cancel()
    log = folder / "server.log"
    verdicts += [log_verdict(log), *([parts_verdict(world, log)] if parts else [])]
    return ChaosReport.of(plan, world, [*load_verdicts(world, plan, answered, unfired), *verdicts], kinds)


@asynccontextmanager
async def open_world(plan: ChaosPlan, folder: Path, temporary: Path) -> AsyncIterator[World]:
    """Start a server; yield the world of the run once it is ready."""
    port, socket = free_port(), folder / "admin.sock"
    endpoint = Endpoint("http", "127.0.0.1", port, "/v1")
    admin = Endpoint("unix", str(socket), 0, "")
    command, environ = plan.command(port, socket), {"TMPDIR": str(temporary), "PYTHONWARNINGS": "default"}
    log = folder / "server.log"
    async with open_server("ullm serve", command, endpoint, log, environ, under_test=True) as server:
        await server.wait_answer("/ready", START_SECONDS)
        model = await first_model(endpoint)
        async with trio.open_nursery() as nursery:
            yield World(
                server=server,
                endpoint=endpoint,
                admin=admin,
                requests=catalogue(model, plan.seed, 16, plan.max_tokens),
                seed=plan.seed,
                nursery=nursery,
                model=model,
                step_timeout=plan.step_timeout,
                stall_timeout=plan.stall_timeout,
                room=ROOM,
            )


async def record_expected(world: World) -> None:
    """Record the answers without faults: to each request alone, then to all at once, which must agree."""
    for request in world.requests:
        answer = await world.send(request)
        world.judge(answer)
        world.expected[request.number] = answer.outcome
    for _ in range(REFERENCE_ROUNDS - 1):
        async with trio.open_nursery() as nursery:
            for request in world.requests:
                nursery.start_soon(_compare, world, request)
    if world.violations:
        raise ResourceUnavailable(f"the server's answers differ even without faults: {world.violations[0]}")


async def ask_once_more(world: World) -> None:
    """Ask everything once more after the last fault, alone: the answers must be those from before the first.

    It also brings back what the next request starts after a reload, such as the process of the templates.
    """
    for request in world.requests:
        if world.server.process.poll() is None:
            world.judge(await world.send(request))


async def disturb(world: World, plan: ChaosPlan, coming: Iterable[Moment], tell: Tell) -> Footprint | None:
    """Inject faults under load until there are enough or time is up; then wait for all requests to end.

    Returns:
        The footprint of the warmed up server; None if time was up before.
    """
    warm: Footprint | None = None
    async with trio.open_nursery() as telling:
        telling.start_soon(_tell_now_and_then, world, plan, tell)
        async with trio.open_nursery() as load:
            world.nursery = load
            for number in range(plan.streams):
                load.start_soon(world.client, number)
            with trio.move_on_after(plan.seconds):
                for moment in coming:
                    if len(world.faults) >= plan.faults or world.server.process.poll() is not None:
                        break
                    await some_faults(world, moment, plan.faults - len(world.faults))
                    if warm is None and len(world.faults) >= WARM_SHARE * plan.faults:
                        warm = Footprint.of(world)
                    await trio.sleep(moment.pause)
            world.stopping.set()
        telling.cancel_scope.cancel()
    return warm


async def _tell_now_and_then(world: World, plan: ChaosPlan, tell: Tell) -> None:
    while True:
        tell(f"{len(world.faults)} of {plan.faults} faults", world)
        await trio.sleep(TELL_EVERY)


async def some_faults(world: World, moment: Moment, most: int) -> None:
    """Inject the faults of a moment together, but not more than are asked for.

    There are no crashes while as many more would have a request refused as the cause, and in no moment more
    than a request may see.
    """
    kinds = {kind.name: kind for kind in all_kinds()} | world.kinds
    drawn = [(kinds[draw.kind], draw) for draw in moment.faults if draw.kind in kinds][:most]
    crashing = [pair for pair in drawn if pair[0].crashes][:MAX_CRASHES]
    drawn = [*crashing, *(pair for pair in drawn if not pair[0].crashes)]
    crashes = len(crashing)
    if crashes:

        async def spared() -> bool:
            return world.most_crashes + crashes <= MAX_CRASHES and not world.hanging

        if not await settle(spared, SPARED):
            world.skipped.append(f"moment {moment.number}: a request in flight has seen enough losses")
            return
    world.begun.append(moment)
    async with trio.open_nursery() as nursery:
        for kind, draw in drawn:
            nursery.start_soon(_inject, world, kind, draw, len(drawn))


async def _inject(world: World, kind: FaultKind, draw: Draw, burst: int) -> None:
    at = trio.current_time()
    detail = await kind.inject(world, draw.source())
    if detail == NOTHING:
        world.skipped.append(f"{draw.key}: {kind.name} found nothing to act on")
    else:
        world.faults.append(InjectedFault(len(world.faults) + 1, kind.name, at, detail, burst))


async def _compare(world: World, request: ChaosRequest) -> None:
    world.judge(await world.send(request))
