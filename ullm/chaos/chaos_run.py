"""A chaos run: a server, its clients, faults drawn from a seed, and the verdicts."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from ullm.chaos import client_faults, operation_faults, planned_faults, signal_faults
from ullm.chaos.catalogue import ChaosRequest, catalogue
from ullm.chaos.chaos_report import ChaosReport
from ullm.chaos.verify import (
    Footprint,
    Verdict,
    after_stop,
    at_rest,
    log_verdict,
    settle,
    shared_memory,
)
from ullm.chaos.world import MAX_CRASHES, NOTHING, FaultKind, InjectedFault, World
from ullm.client.completions import first_model
from ullm.client.http import Endpoint
from ullm.errors import UsageError
from ullm.system.interpreter import python_command
from ullm.testing.processes import free_port, open_server

START_SECONDS = 120.0
REFERENCE_ROUNDS = 2
"""Number of times that each request is sent before the faults; all answers must agree."""
WARM_SHARE = 0.3
"""Share of the faults after which the server's memory counts as warmed up."""
SPARED = 20.0
"""Seconds to wait until requests that have seen `MAX_CRASHES` are finished."""
ROOM = 48
"""Number of requests that the server admits at once, running and waiting."""


@dataclass(frozen=True)
class ChaosPlan:
    """A run.

    Args:
        model: folder or name, as for ``ullm serve``.
        arguments: more options of ``ullm serve``.
        seconds: time limit for the injection of all faults; missing it is a violation.
        streams: number of clients that send one request after another.
        pause: maximum seconds between two faults, drawn uniformly from 0.
        only: kinds to inject, by name or by the part of it before the dot; empty: all.
        max_tokens: minimum and maximum per request.
    """

    model: str
    arguments: tuple[str, ...] = ()
    seed: int = 0
    faults: int = 300
    seconds: float = 600.0
    streams: int = 8
    pause: float = 0.5
    only: tuple[str, ...] = ()
    max_tokens: tuple[int, int] = (20, 200)
    step_timeout: float = 2.0
    stall_timeout: float = 2.0

    def command(self, port: int, admin: Path) -> list[str]:
        """Return the command that starts the server."""
        options = {
            "--port": port,
            "--admin-listen": f"unix:{admin}",
            "--max-bs": ROOM // 3,
            "--max-queue": ROOM - ROOM // 3,
            "--max-restarts": 1_000_000,
            "--step-timeout": self.step_timeout,
            "--stall-timeout": self.stall_timeout,
            "--health-interval": 1,
            "--standby-workers": 1,
            "--sse-keep-alive": 0.5,
        }
        flags = [text for flag, value in options.items() for text in (flag, str(value))]
        return python_command("-m", "ullm", "serve", "--model", self.model, *flags, *self.arguments)


def all_kinds() -> list[FaultKind]:
    """Return every kind of fault."""
    return [*signal_faults.KINDS, *client_faults.KINDS, *operation_faults.KINDS, *planned_faults.KINDS]


def chosen_kinds(only: Sequence[str]) -> list[FaultKind]:
    """Return the kinds that ``only`` names, all if it is empty.

    Raises:
        UsageError: no such kind.
    """
    names = {kind.name for kind in all_kinds()}
    unknown = [name for name in only if name not in names | {each.split(".")[0] for each in names}]
    if unknown:
        raise UsageError(f"--kinds {unknown[0]}: expected some of {', '.join(sorted(names))}")
    return [k for k in all_kinds() if not only or k.name in only or k.name.split(".")[0] in only]


async def run_chaos(plan: ChaosPlan, folder: Path) -> ChaosReport:
    """Start a server, inject faults, judge it, stop it.

    Args:
        folder: holds the server's log, its temporary files and a socket, for which the path must be short.

    Raises:
        UsageError, ServerEnded: the server does not start.
    """
    temporary = folder / "tmp"
    temporary.mkdir()
    shared = shared_memory()
    async with open_world(plan, folder, temporary) as world:
        await record_expected(world)
        before = await rest(world)
        kinds = [kind for kind in chosen_kinds(plan.only) if await kind.offered(world)]
        warm = await disturb(world, plan, kinds) or before
        unfired = await planned_faults.disarm(world)
        verdicts = await at_rest(world, before, warm)
        verdicts += await after_stop(world, temporary, shared)
        world.nursery.cancel_scope.cancel()
    verdicts.append(log_verdict(folder / "server.log"))
    return ChaosReport.of(
        plan.seed, world, [_lossless(world), _enough(world, plan, unfired), *verdicts], kinds
    )


@asynccontextmanager
async def open_world(plan: ChaosPlan, folder: Path, temporary: Path) -> AsyncIterator[World]:
    """Start a server; yield the world of the run once it is ready."""
    port, socket = free_port(), folder / "admin.sock"
    endpoint = Endpoint("http", "127.0.0.1", port, "/v1")
    admin = Endpoint("unix", str(socket), 0, "")
    command, environ = plan.command(port, socket), {"TMPDIR": str(temporary), "PYTHONWARNINGS": "default"}
    async with open_server("ullm serve", command, endpoint, folder / "server.log", environ) as server:
        await server.wait_answer("/ready", START_SECONDS)
        model = await first_model(endpoint)
        async with trio.open_nursery() as nursery:
            yield World(
                server=server,
                endpoint=endpoint,
                admin=admin,
                requests=catalogue(model, plan.seed, 16, plan.max_tokens),
                source=random.Random(f"faults {plan.seed}"),
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
        raise UsageError(f"the server's answers differ even without faults: {world.violations[0]}")


async def rest(world: World) -> Footprint:
    """Wait until the standby workers are up and connections are closed; return the stable footprint."""
    footprints = [Footprint.of(world.server.pid)]

    async def stable() -> bool:
        await trio.sleep(0.5)
        footprints.append(Footprint.of(world.server.pid))
        last, now = footprints[-2:]
        return (last.processes, last.files) == (now.processes, now.files)

    await settle(stable)
    return footprints[-1]


async def disturb(world: World, plan: ChaosPlan, kinds: Sequence[FaultKind]) -> Footprint | None:
    """Inject faults under load until there are enough or time is up; then wait for all requests to end.

    Returns:
        The footprint of the warmed up server; None if time was up before.
    """
    warm: Footprint | None = None
    async with trio.open_nursery() as load:
        world.nursery = load
        for number in range(plan.streams):
            load.start_soon(world.client, number)
        with trio.move_on_after(plan.seconds):
            while len(world.faults) < plan.faults and world.server.process.poll() is None:
                await one_fault(world, kinds)
                if warm is None and len(world.faults) >= WARM_SHARE * plan.faults:
                    warm = Footprint.of(world.server.pid)
                await trio.sleep(world.source.uniform(0, plan.pause))
        world.stopping.set()
    return warm


async def one_fault(world: World, kinds: Sequence[FaultKind]) -> None:
    """Draw and inject one fault; no crash while one more would have a request refused as the cause."""
    kind = world.source.choices(kinds, [kind.weight for kind in kinds])[0]
    if kind.crashes:

        async def spared() -> bool:
            return world.most_crashes < MAX_CRASHES and not world.hanging

        if not await settle(spared, SPARED):
            return
    at = trio.current_time()
    detail = await kind.inject(world)
    if detail != NOTHING:
        world.faults.append(InjectedFault(len(world.faults) + 1, kind.name, at, detail))


async def _compare(world: World, request: ChaosRequest) -> None:
    world.judge(await world.send(request))


def _lossless(world: World) -> Verdict:
    detail = f"{world.counts['answered']} answered, {world.counts['refused']} refused with 429"
    return Verdict("every admitted request ended once, as without faults", not world.violations, detail)


def _enough(world: World, plan: ChaosPlan, unfired: int) -> Verdict:
    count = len(world.faults)
    detail = f"{count} of {plan.faults}; {unfired} armed ones never fired"
    return Verdict("as many faults as asked for", count >= plan.faults, detail)
