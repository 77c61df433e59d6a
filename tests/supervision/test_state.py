"""States go forward only; one writes, many read."""

from __future__ import annotations

import itertools

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import ForwardState, StateCell


class Light(ForwardState):
    """A bulb; its last state is the final one."""

    NEW = "new"
    ON = "on"
    BURNT_OUT = "burnt_out"


class Job(ForwardState):
    """A print job, which has two final states."""

    QUEUED = "queued"
    ACTIVE = "active"
    REVIEWED = "reviewed"
    PRINTED = "printed"
    DELIVERED = "delivered"
    LOST = "lost"

    @property
    def is_final(self) -> bool:
        return self in (Job.DELIVERED, Job.LOST)


def test_states_only_go_forward() -> None:
    for (i, old), (j, new) in itertools.product(enumerate(Light), repeat=2):
        assert old.may_become(new) is (i < j)
        assert old.reached(new) is (i >= j)
    assert [state.is_final for state in Light] == [False, False, True]


def test_nothing_follows_a_final_state() -> None:
    assert Job.PRINTED.may_become(Job.LOST)
    assert not Job.DELIVERED.may_become(Job.LOST)


async def test_history_has_times(autojump_clock: MockClock) -> None:
    cell = StateCell(Job.QUEUED)
    await trio.sleep(2)
    assert cell.set(Job.ACTIVE)
    assert not cell.set(Job.ACTIVE)
    assert cell.value is Job.ACTIVE
    (first, began), (second, ran) = cell.history
    assert (first, second) == (Job.QUEUED, Job.ACTIVE)
    assert ran - began == 2.0


async def test_backwards_is_refused() -> None:
    cell = StateCell(Job.QUEUED)
    cell.set(Job.PRINTED)
    with pytest.raises(ValueError, match="active cannot follow printed"):
        cell.set(Job.ACTIVE)
    assert not cell.advance(Job.REVIEWED)
    assert cell.advance(Job.DELIVERED)
    assert cell.value is Job.DELIVERED


async def test_waiters_see_a_state_that_was_skipped(nursery: trio.Nursery) -> None:
    cell = StateCell(Job.QUEUED)
    seen: list[Job] = []

    async def wait(state: Job) -> None:
        seen.append(await cell.wait_for(state))

    for state in (Job.ACTIVE, Job.REVIEWED):
        nursery.start_soon(wait, state)
    await wait_all_tasks_blocked()
    assert seen == []
    cell.set(Job.ACTIVE)
    cell.set(Job.PRINTED)
    await wait_all_tasks_blocked()
    assert seen == [Job.PRINTED, Job.PRINTED]


async def test_changed_misses_nothing(nursery: trio.Nursery) -> None:
    cell = StateCell(Job.QUEUED)
    cell.set(Job.ACTIVE)
    assert await cell.changed(Job.QUEUED) is Job.ACTIVE
    seen: list[Job] = []

    async def wait() -> None:
        seen.append(await cell.changed(Job.ACTIVE))

    nursery.start_soon(wait)
    nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    assert seen == []
    cell.set(Job.LOST)
    await wait_all_tasks_blocked()
    assert seen == [Job.LOST] * 2
