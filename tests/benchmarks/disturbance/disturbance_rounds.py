"""The rounds: under each disturbance each server is started, measured and stopped, alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import trio

from tests.benchmarks.compare.candidates import ServerCandidate
from tests.benchmarks.compare.comparison_rounds import (
    SETTLE,
    Say,
    Turn,
    log_of,
    order,
    start_candidate,
    take,
)
from tests.benchmarks.compare.hardware import Limits, measure_limits
from tests.benchmarks.compare.scenarios import Figures
from tests.benchmarks.disturbance.disturbance_load import (
    DisturbanceLoad,
    LevelMetrics,
    run_levels,
    wait_until_quiet,
)
from tests.benchmarks.disturbance.disturbances import Disturbance
from tests.benchmarks.disturbance.neighbours import busy_neighbours
from tests.benchmarks.soak.sample import tree_usage


@dataclass
class DisturbedTurns:
    """All turns.

    Args:
        turns: name of the disturbance → turns of all servers and rounds.
        left_out: disturbances that this machine or a server cannot do, and why.
    """

    turns: dict[str, list[Turn]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def all(self) -> list[Turn]:
        """Return the turns under all disturbances."""
        return [turn for turns in self.turns.values() for turn in turns]


async def run_rounds(
    candidates: Sequence[ServerCandidate],
    disturbances: Sequence[Disturbance],
    load: DisturbanceLoad,
    rounds: int,
    logs: Path,
    say: Say,
    measure: Callable[[], Limits] = measure_limits,
) -> DisturbedTurns:
    """Run all rounds; a server that fails is reported, and the others continue.

    The servers' turns under one disturbance follow each other, so that they find the same machine.

    Args:
        logs: folder for the servers' logs.
        say: gets a line after each turn.
        measure: measures the machine's limits at the beginning of each round.

    Raises:
        MachineUnknown: the limits could not be measured.
    """
    left_out = {each.name: why for each in disturbances if (why := each.missing())}
    possible = [each for each in disturbances if each.name not in left_out]
    finished = DisturbedTurns(
        {each.name: [] for each in possible}, left_out | _threadless(candidates, possible)
    )
    for number in range(rounds):
        limits = await trio.to_thread.run_sync(measure)
        for disturbance in order(possible, number):
            for candidate in order([c for c in candidates if disturbance.applies_to(c)], number):
                log = log_of(logs, f"{candidate.name} {disturbance.name}", number)
                seeded = replace(load, seed=load.seed + number)
                work = partial(measure_disturbed, candidate, disturbance, seeded, log)
                turn = await take(Turn(number, candidate.name, None, limits), work)
                finished.turns[disturbance.name].append(turn)
                say(_line(disturbance, turn, load))
                await trio.sleep(SETTLE)
    return finished


async def measure_disturbed(
    candidate: ServerCandidate, disturbance: Disturbance, load: DisturbanceLoad, log: Path
) -> Figures:
    """Start a server, measure it while it is disturbed, stop it.

    Raises:
        UllmError: the server did not start, or did not answer.
    """
    async with disturbance.around(candidate) as disturbed, start_candidate(disturbed, log) as running:
        server = running.server
        if not disturbance.at_once:
            await wait_until_quiet(partial(_seconds, server.pid))
        async with busy_neighbours(disturbance.neighbours):
            figures = await run_levels(running.target, server.endpoint, server.pid, load)
        await running.target.aclose()
        await server.stop()
        return figures


def _threadless(candidates: Sequence[ServerCandidate], disturbances: Sequence[Disturbance]) -> dict[str, str]:
    """Return what is left out because servers have no option for their threads, and why."""
    return {
        f"{disturbance.name}: {candidate.name}": "it has no option for the number of threads"
        for disturbance in disturbances
        for candidate in candidates
        if disturbance.threads and not candidate.threads
    }


async def _seconds(pid: int) -> float:
    return (await trio.to_thread.run_sync(tree_usage, pid)).cpu


def _line(disturbance: Disturbance, turn: Turn, load: DisturbanceLoad) -> str:
    begin = f"round {turn.round + 1}: {disturbance.name}: {turn.candidate}:"
    if turn.figures is None:
        return f"{begin} {turn.error}"
    rates = [turn.figures.values[LevelMetrics.of(level).rate] for level in load.levels]
    return f"{begin} {' / '.join(f'{rate:.0f}' for rate in rates)} tok/s"
