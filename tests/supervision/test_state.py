"""States go forward only; one writes, many read."""

from __future__ import annotations

import itertools

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import EngineState, StateCell
from ullm.supervision.state import may_follow

ORDER = [
    EngineState.STARTING,
    EngineState.RUNNING,
    EngineState.DRAINING,
    EngineState.ABORTING,
    EngineState.STOPPING,
    EngineState.STOPPED,
]


def test_states_only_go_forward() -> None:
    for (i, old), (j, new) in itertools.product(enumerate(ORDER), repeat=2):
        assert may_follow(old, new) is (i < j)


@pytest.mark.parametrize("state", ORDER)
def test_failed_is_final_and_follows_everything_but_stopped(state: EngineState) -> None:
    assert may_follow(state, EngineState.FAILED) is (state is not EngineState.STOPPED)
    assert not may_follow(EngineState.FAILED, state)


def test_what_counts_as_stopping() -> None:
    assert not EngineState.RUNNING.is_stopping
    assert EngineState.DRAINING.is_stopping
    assert EngineState.FAILED.is_stopping


async def test_history_has_times(autojump_clock: MockClock) -> None:
    cell = StateCell()
    await trio.sleep(2)
    assert cell.set(EngineState.RUNNING)
    assert not cell.set(EngineState.RUNNING)
    assert cell.value is EngineState.RUNNING
    (first, began), (second, ran) = cell.history
    assert (first, second) == (EngineState.STARTING, EngineState.RUNNING)
    assert ran - began == 2.0


async def test_backwards_is_refused() -> None:
    cell = StateCell()
    cell.set(EngineState.STOPPING)
    with pytest.raises(ValueError, match="running cannot follow stopping"):
        cell.set(EngineState.RUNNING)
    assert not cell.advance(EngineState.DRAINING)
    assert cell.advance(EngineState.STOPPED)
    assert cell.value is EngineState.STOPPED


async def test_waiters_see_a_state_that_was_skipped(nursery: trio.Nursery) -> None:
    cell = StateCell()
    seen: list[EngineState] = []

    async def wait(state: EngineState) -> None:
        seen.append(await cell.wait_for(state))

    for state in (EngineState.RUNNING, EngineState.ABORTING):
        nursery.start_soon(wait, state)
    await wait_all_tasks_blocked()
    assert seen == []
    cell.set(EngineState.RUNNING)
    cell.set(EngineState.STOPPING)
    await wait_all_tasks_blocked()
    assert seen == [EngineState.STOPPING, EngineState.STOPPING]


async def test_changed_misses_nothing(nursery: trio.Nursery) -> None:
    cell = StateCell()
    cell.set(EngineState.RUNNING)
    assert await cell.changed(EngineState.STARTING) is EngineState.RUNNING
    seen: list[EngineState] = []

    async def wait() -> None:
        seen.append(await cell.changed(EngineState.RUNNING))

    nursery.start_soon(wait)
    nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    assert seen == []
    cell.set(EngineState.FAILED)
    await wait_all_tasks_blocked()
    assert seen == [EngineState.FAILED] * 2
