"""Adding, ending, restarting and forgetting children at run time (OTP's child_adm cases)."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import ChildCounts, ChildSpec, ChildStatus, Restart, Strategy, open_supervisor
from ullm.supervision.errors import ActorLost, ChildConflict, ChildNotFound, StartFailed


async def test_child_administration(cast: Any, autojump_clock: MockClock) -> None:
    spec = cast.spec("child1")
    async with open_supervisor("root", [spec], intensity=0) as supervisor:
        with pytest.raises(ChildConflict, match="child 'child1' of supervisor 'root' exists and is running"):
            await supervisor.start_child(spec)

        report = await supervisor.terminate_child("child1")
        assert report is not None
        assert (report.child_id, report.outcome) == ("child1", "stopped")
        assert [child.status for child in supervisor.which_children()] == [ChildStatus.STOPPED]
        assert supervisor.count_children() == ChildCounts(1, 0, 0, 0, 1)
        assert await supervisor.terminate_child("child1") is None  # ending what has ended succeeds
        with pytest.raises(ChildConflict, match="is stopped"):
            await supervisor.start_child(spec)

        assert (await supervisor.restart_child("child1")).value == 2
        with pytest.raises(ChildConflict, match="is running"):
            await supervisor.restart_child("child1")
        with pytest.raises(ChildConflict, match="is running"):
            await supervisor.delete_child("child1")

        await supervisor.terminate_child("child1")
        await supervisor.delete_child("child1")
        assert supervisor.which_children() == ()
        assert supervisor.count_children() == ChildCounts(0, 0, 0, 0, 0)
        assert (await supervisor.start_child(spec)).value == 3


async def test_unknown_children(autojump_clock: MockClock) -> None:
    async with open_supervisor("root") as supervisor:
        for call in (supervisor.terminate_child, supervisor.delete_child, supervisor.restart_child):
            with pytest.raises(ChildNotFound, match="supervisor 'root' has no child 'x'"):
                await call("x")
        with pytest.raises(LookupError):
            supervisor.get_childspec("x")


async def test_a_restart_by_hand_that_fails_leaves_the_child_stopped(
    cast: Any, autojump_clock: MockClock
) -> None:
    async with open_supervisor("root", [cast.spec("a")], intensity=0) as supervisor:
        await supervisor.terminate_child("a")
        cast.opening("a", "fail")
        with pytest.raises(StartFailed, match="a cannot start"):
            await supervisor.restart_child("a")
        assert supervisor.which_children()[0].status is ChildStatus.STOPPED
        await supervisor.restart_child("a")


async def test_terminating_a_child_leaves_its_siblings_alone(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.spec(name) for name in "abc"]
    async with open_supervisor("root", specs, strategy=Strategy.ONE_FOR_ALL) as supervisor:
        cast.clear()
        await supervisor.terminate_child("a")
        await wait_all_tasks_blocked()
        assert cast.log == ["stop a"]


@pytest.mark.parametrize("how", ["end", "shutdown", "crash", "terminate"])
async def test_temporary_children_are_forgotten(cast: Any, autojump_clock: MockClock, how: str) -> None:
    spec = cast.spec("a", restart=Restart.TEMPORARY)
    async with open_supervisor("root", [spec], intensity=0) as supervisor:
        await (supervisor.terminate_child("a") if how == "terminate" else getattr(cast, how)("a"))
        assert supervisor.which_children() == ()
        assert (await supervisor.start_child(spec)).value == 2


async def test_calls_after_the_stop_say_so(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", [cast.spec("a")]) as supervisor:
        pass
    with pytest.raises(ActorLost, match="supervisor 'root' is stopping"):
        await supervisor.start_child(cast.spec("b"))
    with pytest.raises(ActorLost, match="is stopping"):
        await supervisor.restart_child("a")


async def test_calls_in_flight_when_the_stop_comes(
    cast: Any, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    cast.opening("hanging", "hang")
    cast.opening("beside it", "hang")
    errors: list[str] = []

    async def start(child_id: str) -> None:
        try:
            await supervisor.start_child(cast.spec(child_id))
        except ActorLost as error:
            errors.append(str(error))

    async with open_supervisor("root", [cast.spec("a")]) as supervisor:
        nursery.start_soon(start, "hanging")
        await wait_all_tasks_blocked()
        nursery.start_soon(start, "beside it")
        await wait_all_tasks_blocked()
        reports = await supervisor.stop()
    assert errors == ["supervisor 'root' is stopping"] * 2
    assert [report.child_id for report in reports] == ["beside it", "hanging", "a"]


async def test_a_child_may_change_its_own_supervisor(cast: Any, autojump_clock: MockClock) -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await go.wait()
        await supervisor.start_child(cast.spec("b"))
        await supervisor.terminate_child("a")
        cast.log.append("unreachable: it was cancelled")

    go = trio.Event()
    async with open_supervisor("root", [ChildSpec("a", run)], intensity=0) as supervisor:
        go.set()
        await wait_all_tasks_blocked()
        assert [(child.child_id, child.status) for child in supervisor.which_children()] == [
            ("a", "stopped"),
            ("b", "running"),
        ]
    assert cast.log == ["start b", "stop b"]


async def test_infos_are_frozen_values(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", [cast.spec("a")]) as supervisor:
        before = supervisor.which_children()
        assert before == supervisor.which_children()
        await cast.crash("a")
        assert before[0].restarts == 0
        assert supervisor.which_children()[0].restarts == 1
        with pytest.raises(AttributeError):
            before[0].restarts = 7  # type: ignore[misc]
