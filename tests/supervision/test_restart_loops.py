"""Children that do not come back: loops, hangs and delays never keep others from being served."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import (
    ChildCounts,
    ChildSpec,
    ChildStatus,
    Strategy,
    exponential_backoff,
    open_supervisor,
)
from ullm.supervision.errors import ChildConflict, RestartLimitReached

HOUR = 3600.0


async def test_hanging_restart_loop(cast: Any, autojump_clock: MockClock) -> None:
    """A child that fails again and again can be looked at, terminated, and stopped with its supervisor."""
    options: Any = {"intensity": 8, "period": 10, "restart_delay": lambda _: 2.0}
    async with open_supervisor("root", [cast.spec("child1")], **options) as supervisor:
        cast.opening("child1", always="fail")
        await cast.crash("child1")
        with pytest.raises(ChildConflict, match="is restarting"):
            await supervisor.start_child(cast.spec("child1"))
        with pytest.raises(ChildConflict, match="is restarting"):
            await supervisor.restart_child("child1")
        with pytest.raises(ChildConflict, match="is restarting"):
            await supervisor.delete_child("child1")
        assert supervisor.which_children()[0].status is ChildStatus.RESTARTING
        assert supervisor.count_children() == ChildCounts(1, 0, 1, 0, 1)

        assert await supervisor.terminate_child("child1") is None
        assert supervisor.which_children()[0].status is ChildStatus.STOPPED
        tries = cast.lives["child1"]
        await trio.sleep(60)
        assert cast.lives["child1"] == tries  # no attempt outlives the termination

        cast.opening("child1", "ready", always="fail")
        await supervisor.restart_child("child1")
        await cast.crash("child1")
        before = trio.current_time()
        await supervisor.stop()
        assert trio.current_time() == before


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_a_restart_loop_without_delay_does_not_starve_other_calls(
    cast: Any, autojump_clock: MockClock, strategy: Strategy
) -> None:
    options: Any = {"strategy": strategy, "intensity": float("inf"), "period": HOUR}
    async with open_supervisor("root", [cast.spec("child1")], **options) as supervisor:
        (child,) = supervisor.which_children()
        cast.opening("child1", always="fail")
        cast.tell("child1", cast.Boom())
        while cast.lives["child1"] < 20:
            await trio.lowlevel.checkpoint()
        await supervisor.start_child(cast.spec("child2"))
        await supervisor.terminate_child(child.child_id)
        tries = cast.lives["child1"]
        await wait_all_tasks_blocked()
        assert cast.lives["child1"] == tries


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_a_restart_loop_without_delay_can_be_stopped(
    cast: Any, autojump_clock: MockClock, strategy: Strategy
) -> None:
    options: Any = {"strategy": strategy, "intensity": float("inf"), "period": HOUR}
    async with open_supervisor("root", [cast.spec("child1")], **options) as supervisor:
        cast.opening("child1", always="fail")
        cast.tell("child1", cast.Boom())
        while cast.lives["child1"] < 20:
            await trio.lowlevel.checkpoint()
        await supervisor.stop()


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_a_restart_that_hangs_can_be_stopped(
    cast: Any, autojump_clock: MockClock, strategy: Strategy
) -> None:
    options: Any = {"strategy": strategy, "intensity": 3, "period": HOUR}
    async with open_supervisor("root", [cast.spec("a"), cast.spec("b")], **options) as supervisor:
        cast.opening("a", always="hang")
        await cast.crash("a")
        assert "starting" in {child.status for child in supervisor.which_children()}
        before = trio.current_time()
        await supervisor.stop()
        assert trio.current_time() == before


async def test_a_restart_that_hangs_can_be_terminated(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", [cast.spec("a"), cast.spec("b")], intensity=1) as supervisor:
        cast.opening("a", "hang")
        await cast.crash("a")
        await supervisor.terminate_child("a")
        assert [child.status for child in supervisor.which_children()] == ["stopped", "running"]
        await supervisor.restart_child("a")


async def test_backoff_between_restarts(cast: Any, autojump_clock: MockClock) -> None:
    times: list[float] = []

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        times.append(trio.current_time() - began)
        task_status.started()
        raise cast.Boom

    began = trio.current_time()
    options: Any = {"intensity": 4, "period": HOUR, "restart_delay": exponential_backoff(1.0, 5.0)}
    with pytest.raises(RestartLimitReached):
        async with open_supervisor("root", [ChildSpec("a", run)], **options):
            await trio.sleep_forever()
    assert times == [0.0, 1.0, 3.0, 7.0, 12.0]


async def test_siblings_wait_stopped_while_a_group_backs_off(cast: Any, autojump_clock: MockClock) -> None:
    options: Any = {"strategy": Strategy.ONE_FOR_ALL, "restart_delay": lambda _: 1.0}
    async with open_supervisor("root", [cast.spec("a"), cast.spec("b")], **options) as supervisor:
        await cast.crash("b")
        assert [child.status for child in supervisor.which_children()] == ["stopped", "restarting"]
        await trio.sleep(1.5)
        assert [child.value for child in supervisor.which_children()] == [2, 2]


async def test_a_crash_while_the_group_restarts_is_noticed(cast: Any, autojump_clock: MockClock) -> None:
    """The first child fails right after it was started again, while the second is still starting: at once."""
    options: Any = {"strategy": Strategy.REST_FOR_ONE, "intensity": 3, "period": HOUR}
    async with open_supervisor("root", [cast.spec("a"), cast.spec("b")], **options) as supervisor:
        cast.opening("b", "slow")
        await cast.crash("a")
        assert (cast.lives["a"], cast.lives["b"]) == (2, 2)
        await cast.crash("a")
        assert (cast.lives["a"], cast.lives["b"]) == (3, 3)
        await trio.sleep(1.5)
        assert [child.status for child in supervisor.which_children()] == ["running", "running"]
        assert (cast.lives["a"], cast.lives["b"]) == (3, 3)
