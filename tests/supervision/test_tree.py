"""Supervisors under supervisors (OTP's tree cases)."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import (
    INFINITY,
    ChildCounts,
    ChildReport,
    ChildSpec,
    Kind,
    Restart,
    Strategy,
    Supervisor,
    open_supervisor,
    supervisor_child,
)
from ullm.supervision.errors import RestartLimitReached, StartFailed
from ullm.supervision.shutdown import KILL_GRACE, SETTLE

HOUR = 3600.0


async def test_tree(cast: Any, autojump_clock: MockClock) -> None:
    """Only what fails is restarted; a nested supervisor that gives up comes back without dynamic children."""
    sup1 = supervisor_child("sup1", [cast.spec("child1"), cast.spec("child2")], intensity=4, period=HOUR)
    sup2 = supervisor_child("sup2", intensity=4, period=HOUR)
    options: Any = {"strategy": Strategy.ONE_FOR_ALL, "intensity": 4, "period": HOUR}
    async with open_supervisor("top", **options) as top:
        await top.start_child(sup1)
        nested = (await top.start_child(sup2)).value
        assert isinstance(nested, Supervisor)
        assert top.count_children() == ChildCounts(2, 2, 0, 2, 0)
        await nested.start_child(cast.spec("child3"))
        await nested.start_child(cast.spec("child4"))

        await cast.crash("child4")
        assert [child.restarts for child in nested.which_children()] == [0, 1]
        assert nested.count_children() == ChildCounts(2, 2, 0, 0, 2)
        assert dict(cast.lives) == {"child1": 1, "child2": 1, "child3": 1, "child4": 2}

        cast.opening("child3", always="fail")
        await cast.crash("child3")
        first, second = top.which_children()
        assert (first.kind, first.restarts, second.restarts) == (Kind.SUPERVISOR, 1, 1)
        assert [child.child_id for child in first.children] == ["child1", "child2"]
        assert second.children == ()
        assert second.value is not nested


async def test_stop_order_across_levels(cast: Any, autojump_clock: MockClock) -> None:
    inner = supervisor_child("inner", [cast.spec("b1"), cast.spec("b2")])
    outer = supervisor_child("outer", [cast.spec("a1"), inner, cast.spec("a2")])
    async with open_supervisor("root", [cast.spec("x"), outer, cast.spec("y")]) as supervisor:
        cast.clear()
    assert cast.log == ["stop y", "stop a2", "stop b2", "stop b1", "stop a1", "stop x"]
    assert [report.child_id for report in supervisor.reports[1].children] == ["a2", "inner", "a1"]


async def test_escalation_names_the_first_cause(cast: Any, autojump_clock: MockClock) -> None:
    inner = supervisor_child("inner", [cast.spec("worker")], intensity=0)
    outer = supervisor_child("outer", [inner], intensity=0)

    async def live() -> None:
        async with open_supervisor("root", [outer], intensity=0):
            await cast.crash("worker", "out of memory")
            await trio.sleep_forever()

    with pytest.raises(RestartLimitReached, match="child 'worker': out of memory") as caught:
        await live()
    error: BaseException = caught.value
    while isinstance(error, RestartLimitReached):
        assert error.cause is not None
        error = error.cause
    assert isinstance(error, cast.Boom)


async def test_a_failing_start_deep_in_the_tree(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("worker", "fail")
    inner = supervisor_child("inner", [cast.spec("sibling"), cast.spec("worker")])

    async def live() -> None:
        async with open_supervisor("root", [cast.spec("x"), inner]):
            pytest.fail("the body must not run")

    with pytest.raises(StartFailed, match="child 'inner' failed to start: child 'worker' failed to start"):
        await live()
    assert cast.log == ["start x", "start sibling", "start worker", "stop sibling", "stop x"]


async def test_the_deadline_reaches_every_level(cast: Any, autojump_clock: MockClock) -> None:
    inner = supervisor_child("inner", [cast.tidy("a", 100.0, shutdown=INFINITY)])
    async with open_supervisor("root", [supervisor_child("outer", [inner])]) as supervisor:
        began = trio.current_time()
        await supervisor.stop(began + 7.0)
        assert trio.current_time() - began == pytest.approx(7.0)
    assert cast.log == ["cut short a"]


async def test_a_nested_supervisor_with_a_budget(cast: Any, autojump_clock: MockClock) -> None:
    nested = supervisor_child("nested", [cast.tidy("a", 100.0, shutdown=INFINITY)], shutdown=4.0)
    async with open_supervisor("root", [nested]):
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(4.0)


async def test_abandoned_grandchildren_do_not_take_their_supervisor_along(
    cast: Any, autojump_clock: MockClock
) -> None:
    release, told = trio.Event(), list[ChildReport]()
    nested = supervisor_child(
        "nested", [cast.spec("a"), cast.stubborn("b", release, shutdown=1.0)], on_abandoned=told.append
    )
    async with open_supervisor("root", [cast.spec("x"), nested]) as supervisor:
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(1.0 + SETTLE + KILL_GRACE)
    report, x = supervisor.reports
    assert [child.outcome for child in report.children] == ["abandoned", "stopped"]
    assert (report.count("abandoned"), report.count("stopped"), x.outcome) == (1, 1, "stopped")
    assert told == [report.children[0]]
    release.set()


async def test_a_nested_supervisor_that_is_stopped_by_name_is_restarted_if_permanent(
    cast: Any, autojump_clock: MockClock
) -> None:
    nested = supervisor_child("nested", [cast.spec("a")])
    async with open_supervisor("root", [nested]) as root:
        (info,) = root.which_children()
        await info.value.stop()
        await wait_all_tasks_blocked()
        assert root.which_children()[0].restarts == 1
        assert cast.lives["a"] == 2


async def test_terminating_and_restarting_a_nested_supervisor(cast: Any, autojump_clock: MockClock) -> None:
    nested = supervisor_child("nested", [cast.spec("a"), cast.spec("b", restart=Restart.TEMPORARY)])
    async with open_supervisor("root", [nested]) as root:
        report = await root.terminate_child("nested")
        assert report is not None
        assert [child.child_id for child in report.children] == ["b", "a"]
        assert root.which_children()[0].children == ()
        await root.restart_child("nested")
        assert [child.child_id for child in root.which_children()[0].children] == ["a", "b"]


async def test_a_supervisor_inside_a_child_stops_with_the_child(cast: Any, autojump_clock: MockClock) -> None:
    """open_supervisor may be used in a child's own code; the child's stop deadline holds for it."""

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        async with open_supervisor("inside", [cast.tidy("a", 100.0, shutdown=INFINITY)]):
            task_status.started()
            await trio.sleep_forever()

    async with open_supervisor("root", [ChildSpec("child", run, shutdown=6.0)]) as supervisor:
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(6.0)
    assert supervisor.reports[0].outcome == "stopped"


async def test_two_trees_do_not_know_of_each_other(cast: Any, autojump_clock: MockClock) -> None:
    async with (
        open_supervisor("one", [cast.spec("a")]) as one,
        open_supervisor("two", [cast.spec("b")]) as two,
    ):
        await one.stop()
        assert not two.stopping
        assert len(two.which_children()) == 1
