"""Cancelling an engine at each step of its start, and a supervisor at each step of its body's changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.cancelling import MAX_STEPS, cancel_at_each_step
from ullm.config import EngineConfig
from ullm.engine import open_engine
from ullm.supervision import ChildSpec, open_supervisor
from ullm.testing import FakeWorkers, local_model, virtual_clock


async def start(model: Path) -> None:
    workers = FakeWorkers()
    config = EngineConfig(runner="ullm.testing:ScriptedRunner", model=str(model))
    async with open_engine(config, transport=workers.open, find_model=lambda config: local_model(model)):
        pass


def test_cancelled_at_each_step_of_its_start(model: Path) -> None:
    """Only the cancellation comes out, which the scope around it absorbs."""
    assert 50 < cancel_at_each_step(lambda: start(model), virtual_clock) < MAX_STEPS


async def at_once(*, task_status: trio.TaskStatus[None]) -> None:
    task_status.started()
    await trio.sleep_forever()


async def slowly(*, task_status: trio.TaskStatus[None]) -> None:
    await trio.sleep(1)
    await at_once(task_status=task_status)


async def change_children() -> None:
    """Start, end, restart and delete children, also from two tasks at once."""
    async with open_supervisor("outer"):
        async with open_supervisor("inner", [ChildSpec("a", at_once), ChildSpec("b", slowly)]) as supervisor:
            await supervisor.start_child(ChildSpec("c", slowly))
            await supervisor.start_child(ChildSpec("d", at_once))
            await supervisor.terminate_child("c")
            await supervisor.restart_child("c")
            await supervisor.terminate_child("c")
            await supervisor.delete_child("c")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.start_child, ChildSpec("e", slowly))
                nursery.start_soon(supervisor.terminate_child, "d")


def test_a_body_that_changes_children_is_cancelled_at_each_step() -> None:
    for _ in range(5):  # trio runs the tasks of one step in any order
        assert cancel_at_each_step(change_children, partial(MockClock, autojump_threshold=0)) > 30


async def test_a_body_that_is_cancelled_before_it_calls() -> None:
    """The supervisor has noticed the cancellation already when its body calls it."""
    with trio.CancelScope() as scope:
        async with open_supervisor("s") as supervisor:
            scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
            assert supervisor.stopping
            await supervisor.start_child(ChildSpec("a", at_once))
    assert scope.cancelled_caught
