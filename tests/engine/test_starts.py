"""No start of an engine's children takes for ever, and none keeps the engine from noticing failures."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import trio
from trio.testing import MockClock

from tests.support.engine import STEP, Open, collect, tokens_of
from ullm.engine import Engine
from ullm.errors import EngineNotReady, WorkerLost
from ullm.protocol import start_budget
from ullm.supervision import ChildSpec, Kind, Supervisor
from ullm.testing import FakeBehaviour


def specs(supervisor: Supervisor) -> Iterator[ChildSpec]:
    """All children, those of nested supervisors included."""
    for child in supervisor.which_children():
        yield supervisor.get_childspec(child.child_id)
        if child.kind is Kind.SUPERVISOR:
            yield from specs(child.value)


def root_of(engine: Engine) -> Supervisor:
    root = engine._tree._root
    assert root is not None
    return root


async def test_every_child_has_a_time_limit_for_its_start(clock: MockClock, opened: Open) -> None:
    """A supervisor has that of its children."""
    async with opened(replicas=2) as (engine, _):
        limits = {
            spec.child_id: spec.start_timeout for spec in specs(root_of(engine)) if spec.kind is Kind.WORKER
        }
    assert {"tokenizer", "workers", "scheduler", "router", "lifecycle"} <= set(limits)
    assert all(map(math.isfinite, limits.values())), limits
    assert limits["workers"] > 600.0  # --start-timeout


async def test_a_scheduler_that_never_starts_is_a_failure_like_any_other(
    clock: MockClock, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(max_restarts=5) as (engine, _):
        group = engine._fleet.replicas[0].group
        attach, tries = group.attach, []

        async def hang_once(*arguments: object) -> int:
            tries.append(trio.current_time())
            if len(tries) == 1:
                await trio.sleep_forever()
            return await attach(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(group, "attach", hang_once)
        engine.faults.arm("scheduler.step:raise")
        with trio.fail_after(2 * start_budget.ACTOR):
            assert len(tokens_of(await collect(engine))) == 10
    assert tries[1] - tries[0] == pytest.approx(start_budget.ACTOR, abs=1.0)


async def test_the_loss_of_workers_that_load_again_is_heard(clock: MockClock, opened: Open) -> None:
    """They die while they load, and the other replica dies meanwhile, too."""
    behaviour = FakeBehaviour(step_seconds=STEP, load_seconds=30.0)
    async with opened(behaviour, replicas=2, max_restarts=5) as (engine, workers):
        workers.started[0].die("was killed by SIGKILL")
        await trio.sleep(1.0)
        workers.started[1].die("was killed by SIGKILL")
        workers.started[2].die("was killed by SIGKILL")
        with trio.fail_after(100):
            assert len(tokens_of(await collect(engine))) == 10
        with trio.fail_after(100):
            await engine._fleet.wait_up()


async def test_a_lifecycle_that_fails_while_it_wakes_wakes_after_all(
    clock: MockClock, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start does not wait for the workers, whose start its supervisor has to hear of."""
    behaviour = FakeBehaviour(step_seconds=STEP, load_seconds=40.0)
    async with opened(behaviour) as (engine, _):
        start_all, tries = engine._fleet.start_all, []

        async def fail_once() -> None:
            tries.append(trio.current_time())
            if len(tries) == 1:
                raise RuntimeError("a fault of its own")
            await start_all()

        monkeypatch.setattr(engine._fleet, "start_all", fail_once)
        await engine.sleep(3)
        with pytest.raises(EngineNotReady, match="restarting a part of itself"):
            await engine.wake()
        with trio.fail_after(100):
            assert len(tokens_of(await collect(engine))) == 10
        assert len(tries) == 2


async def test_nobody_waits_for_workers_that_have_gone(clock: MockClock, opened: Open) -> None:
    """Whoever sends to a lost group is cancelled with it; if not, it hears of the loss."""
    async with opened() as (engine, _):
        group = engine._fleet.replicas[0].group
        group._ranks, ranks = [], group._ranks
        with trio.fail_after(60), pytest.raises(WorkerLost, match="replica0 has no workers"):
            await group.wake()
        group._ranks = ranks
