"""Cancelling an engine at each step of its life, and a supervisor at each step of what its body does."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.cancelling import MAX_STEPS, cancel_at_each_step
from ullm.config import EngineConfig
from ullm.engine import Engine, open_engine
from ullm.sampling import SamplingParams
from ullm.supervision import ChildSpec, Restart, StartFailed, Strategy, open_supervisor, supervisor_child
from ullm.testing import FakeBehaviour, FakeWorkers, local_model

instant = partial(MockClock, autojump_threshold=0.0)
"""Nothing here waits for a thread; see `tests.support.seeded`."""

PAIR = "worker.step:crash@nth=3; scheduler.step:raise@nth=4"


@asynccontextmanager
async def opened_alone(model: Path, **options: Any) -> AsyncIterator[Engine]:
    """An engine that leaves no worker behind, however it ends."""
    workers = FakeWorkers(FakeBehaviour(load_seconds=1.0, step_seconds=1.0, sleep_seconds=1.0))
    config = EngineConfig(runner="ullm.testing:ScriptedRunner", model=str(model), **options)
    try:
        async with open_engine(
            config, transport=workers.open, find_model=lambda config: local_model(model)
        ) as engine:
            yield engine
    finally:
        assert not [worker.name for worker in workers.started if worker.alive()]


async def start(model: Path, **options: Any) -> None:
    async with opened_alone(model, **options):
        pass


async def ask(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    async with engine.generate("The supervisor", params) as generation:
        assert sum([len(output.token_ids) async for output in generation]) == 5


async def live(model: Path, **options: Any) -> None:
    """Serve, reload in the middle, sleep, wake up on request, stop."""
    async with opened_alone(model, **options) as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, engine)
            await trio.sleep(1.5)
            await engine.reload()
        await engine.sleep(1)
        await engine.wake()
        await engine.sleep(3)
        await ask(engine)


@pytest.mark.parametrize("replicas", [1, 2])
def test_cancelled_at_each_step_of_its_start(model: Path, replicas: int) -> None:
    """Only the cancellation comes out, which the scope around it absorbs."""
    assert 50 < cancel_at_each_step(lambda: start(model, replicas=replicas), instant) < MAX_STEPS


def test_cancelled_at_some_steps_of_its_life(model: Path) -> None:
    assert cancel_at_each_step(lambda: live(model), instant, first=3, every=29) > 300


LIVES = pytest.mark.parametrize(("replicas", "faults"), [(1, ""), (2, ""), (1, PAIR)])


@pytest.mark.slow
@LIVES
@pytest.mark.parametrize("seed", range(2))
def test_cancelled_at_more_steps_of_its_life(model: Path, replicas: int, faults: str, seed: int) -> None:
    """Also while it restarts what two faults at once have ended."""
    life = partial(live, model, replicas=replicas, faults=faults, max_restarts=5)
    assert cancel_at_each_step(life, instant, seed=seed, first=1 + seed, every=13) > 300


@pytest.mark.long
@LIVES
@pytest.mark.parametrize("seed", range(10))
def test_cancelled_at_each_step_of_its_life(model: Path, replicas: int, faults: str, seed: int) -> None:
    life = partial(live, model, replicas=replicas, faults=faults, max_restarts=5)
    assert cancel_at_each_step(life, instant, seed=seed) > 300


# --- a supervisor -------------------------------------------------------------------------------------------


class Children:
    """Children that know how many of them are alive."""

    def __init__(self) -> None:
        self._alive = 0

    def spec(
        self, child_id: str, *, opening: float = 0.0, life: float = math.inf, **options: Any
    ) -> ChildSpec:
        """A child that is ready after ``opening`` seconds, and fails ``life`` seconds later."""

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            self._alive += 1
            try:
                await trio.sleep(opening)
                task_status.started()
                await trio.sleep(life)
                raise OSError("as so often")
            finally:
                self._alive -= 1

        return ChildSpec(child_id, run, **options)

    @asynccontextmanager
    async def none_left(self) -> AsyncIterator[None]:
        """Check it, however the block ends."""
        try:
            yield
        finally:
            assert self._alive == 0


async def change_children() -> None:
    """Start, end, restart and delete children, also from two tasks at once."""
    make = Children()
    async with make.none_left(), open_supervisor("outer"):
        first = [make.spec("a"), make.spec("b", opening=1)]
        async with open_supervisor("inner", first) as supervisor:
            await supervisor.start_child(make.spec("c", opening=1))
            await supervisor.start_child(make.spec("d"))
            await supervisor.terminate_child("c")
            await supervisor.restart_child("c")
            await supervisor.terminate_child("c")
            await supervisor.delete_child("c")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.start_child, make.spec("e", opening=1))
                nursery.start_soon(supervisor.terminate_child, "d")


async def amid_failures(strategy: Strategy, delay: Callable[[int], float] | None = None) -> None:
    """The same while children fail, are started again by rule, and take too long to start."""
    make = Children()
    specs = [make.spec("a", life=1.7), make.spec("b", opening=1), make.spec("c", life=1.5)]
    nested = supervisor_child("group", specs, strategy=strategy, intensity=100, restart_delay=delay)
    late = make.spec("late", opening=math.inf, restart=Restart.TEMPORARY, start_timeout=2.5)
    async with make.none_left(), open_supervisor("outer", [nested], intensity=100) as supervisor:
        group = supervisor.which_children()[0].value
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused, group.start_child, late)
            nursery.start_soon(refused, group.start_child, make.spec("d", opening=1))
            await trio.sleep(1.2)
            nursery.start_soon(group.terminate_child, "b")
            nursery.start_soon(refused, supervisor.start_child, late)
        await group.terminate_child("a")
        await group.restart_child("a")
        await trio.sleep(4.0)


async def refused(call: Callable[[ChildSpec], Any], spec: ChildSpec) -> None:
    """Expect that it fails to start, or is ended with a sibling while it starts."""
    with suppress(StartFailed):
        await call(spec)


@pytest.mark.parametrize("seed", range(5))
def test_a_body_that_changes_children_is_cancelled_at_each_step(seed: int) -> None:
    assert cancel_at_each_step(change_children, instant, seed=seed) > 30


@pytest.mark.parametrize("strategy", list(Strategy)[:3])
@pytest.mark.parametrize("delay", [None, 0.4])
@pytest.mark.parametrize(
    "seed",
    [
        0,
        *(
            pytest.param(seed, marks=pytest.mark.slow if seed < 3 else pytest.mark.long)
            for seed in range(1, 10)
        ),
    ],
)
def test_amid_failures_it_is_cancelled_at_each_step(
    strategy: Strategy, delay: float | None, seed: int
) -> None:
    work = partial(amid_failures, strategy, None if delay is None else lambda _: delay)
    assert cancel_at_each_step(work, instant, seed=seed) > 100


async def test_a_body_that_is_cancelled_before_it_calls() -> None:
    """The supervisor has noticed the cancellation already when its body calls it."""
    with trio.CancelScope() as scope:
        async with open_supervisor("s") as supervisor:
            scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
            assert supervisor.stopping
            await supervisor.start_child(Children().spec("a"))
    assert scope.cancelled_caught
