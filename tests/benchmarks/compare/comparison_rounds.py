"""The rounds: each candidate is started, measured and stopped, alone, in an order that rotates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from tests.benchmarks.compare import scenarios as named
from tests.benchmarks.compare.candidates import ServerCandidate
from tests.benchmarks.compare.hardware import Limits, measure_limits
from tests.benchmarks.compare.scenarios import ComparisonLoad, Figures, Metric, first_token, run_scenarios
from ullm.bench.server_target import ServerTarget
from ullm.client.completions import first_model
from ullm.client.http import Endpoint
from ullm.errors import UllmError, UsageError
from ullm.testing.processes import MeasuredServer, free_port, open_server, tree_memory

MIB = 1 << 20
SETTLE = 1.0
"""Seconds between one server and the next, so that the first one's memory is free again."""

Say = Callable[[str], None]


class Comparable(Protocol):
    """A server or an engine that takes part."""

    @property
    def name(self) -> str:
        """Its name in reports."""

    @property
    def is_peer(self) -> bool:
        """False for ullm."""


T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """One candidate in one round; ``error`` instead of figures where it failed.

    Args:
        limits: the machine's limits, measured just before; on a shared machine they change by half within
            minutes.
    """

    round: int
    candidate: str
    figures: Figures | None
    limits: Limits
    error: str = ""


def order(candidates: Sequence[T], number: int) -> list[T]:
    """Rotate the candidates by one each round, so that none always follows the same one."""
    shift = number % max(1, len(candidates))
    return [*candidates[shift:], *candidates[:shift]]


def choose(baseline: str | None, participants: Sequence[Comparable]) -> str:
    """Return the baseline's full name; without a choice, that of the first peer, or of the first at all.

    Raises:
        UsageError: no participant has such a name.
    """
    if baseline is None:
        return next((each.name for each in participants if each.is_peer), participants[0].name)
    fitting = [each.name for each in participants if baseline.lower() in each.name.lower()]
    if not fitting:
        raise UsageError(
            f"--baseline {baseline}: expected one of {', '.join(each.name for each in participants)}"
        )
    return fitting[0]


def baseline_of(baseline: str | None, participants: Sequence[Comparable], turns: Sequence[Turn]) -> str:
    """Return the baseline's full name; without a choice, it is one that was measured."""
    done = {turn.candidate for turn in turns if turn.figures is not None}
    measured = [each for each in participants if each.name in done] or participants
    return choose(baseline, participants if baseline else measured)


def check_names(participants: Sequence[Comparable], flag: str) -> None:
    """Raise `UsageError` if two participants have the same name; names the flag that gives names."""
    names = [each.name for each in participants]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{flag} names {twice[0]!r} twice")


async def run_rounds(
    candidates: Sequence[ServerCandidate],
    load: ComparisonLoad,
    rounds: int,
    logs: Path,
    say: Say,
    measure: Callable[[], Limits] = measure_limits,
) -> list[Turn]:
    """Run all rounds; a candidate that fails is reported, and the others continue.

    Args:
        logs: folder for the servers' logs.
        say: gets a line after each turn.
        measure: measures the machine's limits before each turn.

    Raises:
        MachineUnknown: the limits could not be measured.
    """
    turns = []
    for number in range(rounds):
        for candidate in order(candidates, number):
            turn = Turn(number, candidate.name, None, await trio.to_thread.run_sync(measure))
            measure_it = partial(
                measure_candidate,
                candidate,
                replace(load, seed=load.seed + number),
                log_of(logs, candidate.name, number),
            )
            turns.append(await take(turn, measure_it))
            say(_line(turns[-1]))
            await trio.sleep(SETTLE)
    return turns


async def measure_candidate(candidate: ServerCandidate, load: ComparisonLoad, log: Path) -> Figures:
    """Start a server, measure it, stop it.

    Raises:
        UllmError: the server did not start, or did not answer.
    """
    load = replace(load, scenarios=tuple(s for s in load.scenarios if s in candidate.scenarios))
    async with start_candidate(candidate, log) as running:
        server, target, start = running.server, running.target, running.start
        memory: list[float] = []

        async def weigh() -> None:
            memory.append(await trio.to_thread.run_sync(tree_memory, server.pid) / MIB)

        start[named.START_FIRST] = await first_token(target, load.seed) - server.started
        figures = await run_scenarios(target, load, weigh)
        await target.aclose()  # so that the server is idle when it is stopped
        status, seconds = await server.stop()
        stop = {} if status is None else {named.STOP: seconds}
        figures.values = {**figures.values, **start, named.MEMORY: memory[0], **stop}
        return figures


@dataclass
class RunningCandidate:
    """A candidate that was started and is ready; ``start``: the seconds that it took."""

    server: MeasuredServer
    target: ServerTarget
    start: dict[Metric, float]


@asynccontextmanager
async def start_candidate(candidate: ServerCandidate, log: Path) -> AsyncIterator[RunningCandidate]:
    """Start a server and wait until it is ready; at the end of the block it is killed, unless it has ended.

    Raises:
        UllmError: the server did not start.
    """
    port = free_port()
    endpoint = Endpoint("http", "127.0.0.1", port, "/v1")
    async with open_server(candidate.name, candidate.command(port), endpoint, log) as server:
        start = {
            named.START_LIVE: await server.wait_answer(
                candidate.live, candidate.start_seconds, any_status=True
            ),
            named.START_READY: await server.wait_answer(candidate.ready, candidate.start_seconds),
        }
        target = ServerTarget(endpoint, await first_model(endpoint))
        try:
            yield RunningCandidate(server, target, start)
        finally:
            await target.aclose()


def log_of(logs: Path, name: str, number: int) -> Path:
    """Return the file for a server's log in a round."""
    return logs / f"{''.join(c if c.isalnum() else '-' for c in name)}-{number + 1}.log"


async def take(turn: Turn, measure: Callable[[], Awaitable[Figures]]) -> Turn:
    """Return the turn with the figures, or with the error."""
    try:
        return replace(turn, figures=await measure())
    except UllmError as error:
        return replace(turn, error=" ".join(str(error).split()))


def _line(turn: Turn) -> str:
    if turn.figures is None:
        return f"round {turn.round + 1}: {turn.candidate}: {turn.error}"
    shown = [f"{value:.0f}" for metric, value in turn.figures.values.items() if metric.unit == "tok/s"]
    return f"round {turn.round + 1}: {turn.candidate}: {' / '.join(shown) or 'done'} tok/s"
