"""A supervisor hears of everything while a child is being started, and no start takes for ever."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import (
    ChildSpec,
    ChildStatus,
    RestartLimitReached,
    StartFailed,
    StartTimeout,
    Strategy,
    Supervisor,
    open_supervisor,
)

HOUR = 3600.0


def statuses(supervisor: Supervisor) -> list[str]:
    return [child.status.value for child in supervisor.which_children()]


# --- while a child is being restarted ------------------------------------------------------------------


async def hanging_restart(cast: Any, child_id: str) -> None:
    cast.opening(child_id, "hang")
    await cast.crash(child_id)


async def test_another_child_fails(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", [cast.spec("a"), cast.spec("b")], intensity=9) as supervisor:
        await hanging_restart(cast, "a")
        await cast.crash("b")
        assert statuses(supervisor) == ["starting", "running"]
        assert (cast.lives["a"], cast.lives["b"]) == (2, 2)


async def test_another_child_fails_too_often(cast: Any, autojump_clock: MockClock) -> None:
    async def live() -> None:
        async with open_supervisor("root", [cast.spec("a"), cast.spec("b")], intensity=1):
            await hanging_restart(cast, "a")
            await cast.crash("b")
            await trio.sleep_forever()

    with pytest.raises(RestartLimitReached, match="child 'b': boom"):
        await live()


@pytest.mark.parametrize("strategy", [Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE])
async def test_a_child_of_its_group_fails(cast: Any, autojump_clock: MockClock, strategy: Strategy) -> None:
    """What waits for a sibling that has gone is ended with it, and started again after it."""
    specs = [cast.spec(name) for name in "abc"]
    async with open_supervisor("root", specs, strategy=strategy, intensity=9) as supervisor:
        await hanging_restart(cast, "b")
        assert statuses(supervisor) == ["running", "starting", "restarting"]
        cast.clear()
        await cast.crash("a")
        assert cast.log == ["stop a", "start a", "start b", "start c"]
        assert statuses(supervisor) == ["running"] * 3


async def test_children_are_started_and_ended_by_calls(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", [cast.spec(name) for name in "abc"]) as supervisor:
        await supervisor.terminate_child("c")
        await hanging_restart(cast, "a")
        assert (await supervisor.start_child(cast.spec("d"))).status is ChildStatus.RUNNING
        assert (await supervisor.restart_child("c")).status is ChildStatus.RUNNING
        await supervisor.terminate_child("b")
        await supervisor.delete_child("b")
        assert statuses(supervisor) == ["starting", "running", "running"]
        before = trio.current_time()
        await supervisor.stop()
        assert trio.current_time() == before


async def test_a_child_that_waits_for_its_turn_is_terminated(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.spec(name) for name in "abc"]
    async with open_supervisor("root", specs, strategy=Strategy.ONE_FOR_ALL) as supervisor:
        cast.opening("a", "slow")
        await cast.crash("c")
        await supervisor.terminate_child("b")
        await trio.sleep(2)
        assert statuses(supervisor) == ["running", "stopped", "running"]


# --- while a child is started for the first time ----------------------------------------------------------


async def test_a_child_fails_while_the_supervisor_starts(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("b", "slow")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_crash_soon, cast, "a")
        async with open_supervisor("root", [cast.spec("a"), cast.spec("b")]):
            assert cast.log == ["start a", "start b", "stop a", "start a"]


async def _crash_soon(cast: Any, child_id: str) -> None:
    await trio.sleep(0.5)
    await cast.crash(child_id)


async def test_a_start_that_a_sibling_ends_has_failed(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("b", "hang")
    specs = [cast.spec("a"), cast.spec("b")]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_crash_soon, cast, "a")
        with pytest.raises(StartFailed, match="child 'b' failed to start: boom"):
            async with open_supervisor("root", specs, strategy=Strategy.REST_FOR_ONE):
                pytest.fail("the body must not run")
    assert cast.log == ["start a", "start b", "stop a"]


async def test_a_called_start_that_a_sibling_ends_has_failed(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("b", "hang")
    async with open_supervisor("root", [cast.spec("a")], strategy=Strategy.ONE_FOR_ALL) as supervisor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_crash_soon, cast, "a")
            with pytest.raises(StartFailed, match="child 'b' failed to start: boom"):
                await supervisor.start_child(cast.spec("b"))
        assert statuses(supervisor) == ["running"]


# --- time limits --------------------------------------------------------------------------------------


async def test_a_first_start_that_takes_too_long(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("b", "hang")
    with pytest.raises(
        StartFailed, match="child 'b' failed to start: 'b' was not ready within 7 s"
    ) as caught:
        async with open_supervisor("root", [cast.spec("a"), cast.spec("b", start_timeout=7.0)]):
            pytest.fail("the body must not run")
    assert isinstance(caught.value.cause, StartTimeout)
    assert cast.log == ["start a", "start b", "stop a"]


async def test_a_called_start_that_takes_too_long(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("a", "hang")
    async with open_supervisor("root") as supervisor:
        with pytest.raises(StartFailed, match="was not ready within 7 s"):
            await supervisor.start_child(cast.spec("a", start_timeout=7.0))
        assert (await supervisor.start_child(cast.spec("a", start_timeout=7.0))).value == 2
        await trio.sleep(HOUR)
        assert statuses(supervisor) == ["running"]


async def test_a_restart_that_takes_too_long_counts_and_is_tried_again(
    cast: Any, autojump_clock: MockClock
) -> None:
    spec = cast.spec("a", start_timeout=7.0)
    async with open_supervisor("root", [spec], intensity=2, period=HOUR) as supervisor:
        await hanging_restart(cast, "a")
        await trio.sleep(8)
        assert (cast.lives["a"], statuses(supervisor)) == (3, ["running"])


async def test_restarts_that_take_too_long_end_with_their_cause(cast: Any, autojump_clock: MockClock) -> None:
    spec = cast.spec("a", start_timeout=7.0)

    async def live() -> None:
        async with open_supervisor("root", [spec], intensity=2, period=HOUR):
            cast.opening("a", always="hang")
            await cast.crash("a")
            await trio.sleep_forever()

    with pytest.raises(RestartLimitReached, match="'a' was not ready within 7 s"):
        await live()
    assert cast.lives["a"] == 3


async def test_a_start_that_ignores_its_end_is_left_behind(cast: Any, autojump_clock: MockClock) -> None:
    release, killed = trio.Event(), []

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope(shield=True):
            await release.wait()

    spec = ChildSpec("a", run, shutdown=1.0, start_timeout=7.0, kill=lambda: killed.append("a"))
    before = trio.current_time()
    async with open_supervisor("root") as supervisor:
        with pytest.raises(StartFailed, match="was not ready within 7 s"):
            await supervisor.start_child(spec)
        assert 8 <= trio.current_time() - before < 9
        assert killed == ["a"]
        release.set()
        await wait_all_tasks_blocked()
