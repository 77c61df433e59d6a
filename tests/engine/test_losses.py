"""A worker is lost at some scheduler step of an engine's life, and a second thing goes wrong soon after."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support.cancelling import Steps
from tests.support.coincidences import (
    AFTER,
    EARLY,
    HOUR,
    LATE,
    Run,
    Sweep,
    ask,
    change,
    come_to_rest,
    judge_end,
)
from tests.support.seeded import run_seeded
from ullm.engine import Engine, EngineState
from ullm.errors import EngineDead, UllmError
from ullm.testing import FakeBehaviour, FakeWorkers, open_scripted_engine

GAPS = (1, 2, 3, 5, 8, 13, 21, 40)
"""Scheduler steps between the first thing that goes wrong and the second one."""

SECOND = ("die", "hang", "scheduler.step:raise", "router.tokens:raise", "worker.start:crash")
RESTART = 70.0
"""Seconds after which a worker that hangs in its start is known to hang."""


class Misfortunes:
    """Ends a worker before one step of a run, and does something else before another.

    Attributes:
        engine: set as soon as there is one, for faults that need it.
    """

    def __init__(self, workers: FakeWorkers, step: int, gap: int, second: str) -> None:
        self.engine: Engine | None = None
        self._workers = workers
        self._gap = gap
        self._second = second
        self.first = Steps(step, self._lose_one)

    def _lose_one(self) -> None:
        for worker in [worker for worker in self._workers.started if worker.alive()][:1]:
            worker.die("was killed by SIGKILL")
        trio.lowlevel.add_instrument(Steps(self._gap, self._add_to_it))

    def _add_to_it(self) -> None:
        if self._second not in ("die", "hang"):
            if self.engine is not None:
                self.engine.faults.arm(self._second)
            return
        for worker in [worker for worker in self._workers.started if worker.alive()][-1:]:
            worker.hang() if self._second == "hang" else worker.die("was killed by SIGKILL")


async def live(model: Path, run: Run, replicas: int, step: int, gap: int, second: str) -> bool:
    """Live through everything; return whether it came to that step."""
    behaviour = FakeBehaviour(step_seconds=1.0, load_seconds=3.0, sleep_seconds=0.5, wake_seconds=2.0)
    workers = FakeWorkers(behaviour)
    misfortunes = Misfortunes(workers, step, gap, second)
    trio.lowlevel.add_instrument(misfortunes.first)
    options = {"replicas": replicas, "max_restarts": 6, "shutdown_timeout": HOUR}
    try:
        with trio.fail_after(5 * HOUR):
            async with open_scripted_engine(model, workers=workers, **options) as engine:
                misfortunes.engine = engine
                await use(engine, run)
    except UllmError as error:
        run.failure = error
        if misfortunes.engine is not None and not isinstance(error, EngineDead):
            run.problems.append(f"the engine that ran ended with {error!r}")
    if any(worker.alive() for worker in workers.started):
        run.problems.append("a worker was left behind")
    if misfortunes.engine is not None:
        judge_end(misfortunes.engine, run)
    return misfortunes.first.reached


async def use(engine: Engine, run: Run) -> None:
    """Serve, reload, sleep lightly and deeply, serve."""
    async with trio.open_nursery() as nursery:
        for prompt in EARLY:
            nursery.start_soon(ask, engine, prompt, run)
        await trio.sleep(2.5)
        await change(engine, run, "reload")
        nursery.start_soon(ask, engine, LATE, run)
        await trio.sleep(0.5)
        for level in (1, 3):
            await change(engine, run, "sleep", level)
            await change(engine, run, "wake")
    if engine.state is EngineState.RUNNING:
        await ask(engine, AFTER, run)
        await trio.sleep(RESTART)
        await come_to_rest(engine, run)


def lose_everywhere(model: Path, seed: int, stride: int) -> None:
    """Go through the life in strides of at most so many steps, with another second misfortune each time."""
    source, sweep, step, reached = random.Random(seed), Sweep(model), 0, True
    while reached:
        step += source.randint(1, stride)
        replicas, gap, second = source.choice((1, 2)), source.choice(GAPS), source.choice(SECOND)
        run = Run()
        reached = run_seeded(seed, partial(live, model, run, replicas, step, gap, second))
        problems = run.problems + sweep.differences(run)
        assert not problems, f"seed {seed}: {(replicas, step, gap, second)}: {problems}"
    assert step > 300


def test_a_worker_and_something_else_at_some_steps(model: Path) -> None:
    lose_everywhere(model, 0, 80)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_worker_and_something_else_at_more_steps(model: Path, seed: int) -> None:
    lose_everywhere(model, seed, 12)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 200))
def test_a_worker_and_something_else_at_each_step(model: Path, seed: int) -> None:
    lose_everywhere(model, seed, 1)
