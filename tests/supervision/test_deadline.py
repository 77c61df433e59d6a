"""One deadline for a whole stop, which may move while the stop is under way."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import (
    INFINITY,
    ChildSpec,
    Strategy,
    cleanup_scope,
    open_supervisor,
    supervisor_child,
)
from ullm.supervision.shutdown import KILL_GRACE, SETTLE


async def test_the_deadline_is_shared_in_proportion(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.tidy("a", 100.0, shutdown=30.0), cast.tidy("b", 100.0, shutdown=10.0)]
    async with open_supervisor("root", specs) as supervisor:
        began = trio.current_time()
        await supervisor.stop(began + 20.0)
        assert trio.current_time() - began == pytest.approx(20.0)
    assert [report.seconds for report in supervisor.reports] == pytest.approx([5.0, 15.0])


async def test_unused_time_passes_on_to_the_next_stage(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.tidy("a", 100.0, shutdown=30.0), cast.tidy("b", 1.0, shutdown=10.0)]
    async with open_supervisor("root", specs) as supervisor:
        await supervisor.stop(trio.current_time() + 20.0)
    assert [report.seconds for report in supervisor.reports] == pytest.approx([1.0, 19.0])


async def test_what_is_left_at_the_deadline_stops_at_once(cast: Any, autojump_clock: MockClock) -> None:
    """However many children ignore the stop, it is over a fixed time after the deadline."""
    release = trio.Event()
    specs = [cast.stubborn(f"c{n}", release, shutdown=1.0) for n in range(50)]
    async with open_supervisor("root", specs) as supervisor:
        began = trio.current_time()
        reports = await supervisor.stop(began + 3.0)
        assert trio.current_time() - began <= 3.0 + 2 * (SETTLE + KILL_GRACE) + 1e-6
    assert {report.outcome for report in reports} == {"abandoned"}
    assert [report.child_id for report in reports] == [f"c{n}" for n in reversed(range(50))]
    release.set()


async def test_a_deadline_in_the_past_still_stops_well_behaved_children(
    cast: Any, autojump_clock: MockClock
) -> None:
    async with open_supervisor("root", [cast.spec(name) for name in "abc"]) as supervisor:
        reports = await supervisor.stop(trio.current_time() - 1.0)
    assert cast.outcomes(reports) == [("c", "stopped"), ("b", "stopped"), ("a", "stopped")]


async def test_an_earlier_deadline_expedites_a_stop(
    cast: Any, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    specs = [cast.tidy(name, 100.0, shutdown=INFINITY) for name in "ab"]
    async with open_supervisor("root", specs) as supervisor:
        began = trio.current_time()
        nursery.start_soon(supervisor.stop, began + 80.0)
        await trio.sleep(10)
        assert cast.log == []
        await supervisor.stop(began + 20.0)
        assert trio.current_time() - began == pytest.approx(20.0)
    assert cast.log == ["cut short b", "cut short a"]


async def test_a_later_deadline_does_not_extend_a_stop(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", [cast.tidy("a", 100.0, shutdown=INFINITY)]) as supervisor:
        began = trio.current_time()
        supervisor.request_stop(began + 5.0)
        await supervisor.stop(began + 50.0)
        assert trio.current_time() - began == pytest.approx(5.0)


async def test_the_cleanup_scope_follows_an_expedited_stop(cast: Any, autojump_clock: MockClock) -> None:
    deadlines: list[float] = []

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            with cleanup_scope() as scope:
                deadlines.append(scope.deadline)
                try:
                    await trio.sleep_forever()
                finally:
                    deadlines.append(scope.deadline)

    nested = supervisor_child("nested", [ChildSpec("a", run, shutdown=50.0)])
    async with open_supervisor("root", [nested]) as supervisor:
        began = trio.current_time()
        supervisor.request_stop(began + 40.0)
        await trio.sleep(1)
        supervisor.request_stop(began + 3.0)
    assert deadlines == pytest.approx([began + 40.0, began + 3.0])


async def test_kill_calls_every_hook_at_once(cast: Any, autojump_clock: MockClock) -> None:
    release = trio.Event()
    killed: list[str] = []

    def hook(name: str) -> ChildSpec:
        return cast.stubborn(name, release, kill=lambda: killed.append(name))  # type: ignore[no-any-return]

    nested = supervisor_child("nested", [hook("c"), hook("d")])
    async with open_supervisor("root", [hook("a"), nested, hook("b")]) as supervisor:
        began = trio.current_time()
        supervisor.kill()
        await wait_all_tasks_blocked()
        assert sorted(killed) == ["a", "b", "c", "d"]
        assert trio.current_time() == began
        release.set()
    assert [report.outcome for report in supervisor.reports] == ["killed"] * 3
    assert supervisor.reports[1].count("killed") == 2


async def test_kill_in_the_middle_of_an_orderly_stop(cast: Any, autojump_clock: MockClock) -> None:
    release = trio.Event()
    specs = [
        cast.tidy("a", 50.0, shutdown=60.0),
        cast.stubborn("b", release, shutdown=60.0, kill=release.set),
    ]
    async with open_supervisor("root", specs) as supervisor:
        began = trio.current_time()
        supervisor.request_stop()
        await trio.sleep(5)
        supervisor.kill()
    assert trio.current_time() - began == pytest.approx(5.0)
    assert cast.outcomes(supervisor.reports) == [("b", "killed"), ("a", "killed")]
    assert cast.log == ["cut short a"]


async def test_a_busy_event_loop_does_not_make_a_child_look_stubborn(autojump_clock: MockClock) -> None:
    """The budget passes while the loop is blocked: the child still gets its turn before it is given up."""

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            autojump_clock.jump(100.0)

    specs = [ChildSpec(f"c{n}", run, shutdown=1.0) for n in range(20)]
    async with open_supervisor("root", specs, strategy=Strategy.DYNAMIC) as supervisor:
        pass
    assert {report.outcome for report in supervisor.reports} == {"stopped"}
