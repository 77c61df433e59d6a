"""Starting: order, readiness, children that decline, children that fail (OTP's sup_start cases)."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import (
    BRUTAL_KILL,
    INFINITY,
    ChildCounts,
    ChildSpec,
    ChildStatus,
    Kind,
    Restart,
    Strategy,
    cleanup_scope,
    open_supervisor,
    supervisor_child,
)
from ullm.supervision.errors import InvalidSpec, StartFailed


async def test_start_normal(autojump_clock: MockClock) -> None:
    async with open_supervisor("root") as supervisor:
        assert supervisor.which_children() == ()
        assert supervisor.count_children() == ChildCounts(0, 0, 0, 0, 0)
        assert repr(supervisor) == "<Supervisor 'root' running, 0 children>"
    assert repr(supervisor) == "<Supervisor 'root' stopped, 0 children>"
    assert supervisor.reports == ()


async def test_children_start_in_order_each_when_the_one_before_is_ready(autojump_clock: MockClock) -> None:
    times: list[tuple[str, float]] = []

    def slow(name: str) -> ChildSpec:
        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            times.append((name, trio.current_time() - began))
            await trio.sleep(1)
            task_status.started()
            await trio.sleep_forever()

        return ChildSpec(name, run)

    began = trio.current_time()
    async with open_supervisor("root", [slow("a"), slow("b"), slow("c")]):
        assert times == [("a", 0.0), ("b", 1.0), ("c", 2.0)]
        assert trio.current_time() - began == 3.0


async def test_start_ignore_child(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("child1", "ignore")
    async with open_supervisor("root") as supervisor:
        declined = await supervisor.start_child(cast.spec("child1"))
        started = await supervisor.start_child(cast.spec("child2"))
        assert (declined.status, declined.value) == (ChildStatus.STOPPED, None)
        assert (started.status, started.value) == (ChildStatus.RUNNING, 1)
        assert [child.child_id for child in supervisor.which_children()] == ["child1", "child2"]
        assert supervisor.count_children() == ChildCounts(2, 1, 0, 0, 2)


async def test_a_child_that_declines_is_not_restarted_and_can_be_started_later(
    cast: Any, autojump_clock: MockClock
) -> None:
    cast.opening("a", "ignore")
    async with open_supervisor("root", [cast.spec("a")], intensity=0) as supervisor:
        await wait_all_tasks_blocked()
        assert (await supervisor.restart_child("a")).status is ChildStatus.RUNNING


async def test_start_ignore_temporary_child(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("child1", "ignore")
    specs = [cast.spec(child_id, restart=Restart.TEMPORARY) for child_id in ("child1", "child2")]
    async with open_supervisor("root", specs) as supervisor:
        assert [child.child_id for child in supervisor.which_children()] == ["child2"]
        assert supervisor.count_children() == ChildCounts(1, 1, 0, 0, 1)


async def test_start_ignore_temporary_child_start_child(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("child1", "ignore")
    async with open_supervisor("root") as supervisor:
        await supervisor.start_child(cast.spec("child1", restart=Restart.TEMPORARY))
        await supervisor.start_child(cast.spec("child2", restart=Restart.TEMPORARY))
        assert [child.child_id for child in supervisor.which_children()] == ["child2"]


@pytest.mark.parametrize("restart", list(Restart))
async def test_start_ignore_dynamic_child(cast: Any, autojump_clock: MockClock, restart: Restart) -> None:
    cast.opening("child", "ignore")
    async with open_supervisor("root", strategy=Strategy.DYNAMIC) as supervisor:
        assert (await supervisor.start_child(cast.spec("child", restart=restart))).value is None
        second = await supervisor.start_child(cast.spec("child", restart=restart))
        assert supervisor.which_children() == (second,)
        assert supervisor.count_children() == ChildCounts(1, 1, 0, 0, 1)


async def test_start_fail_stops_those_before_in_reverse_order(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("c", "fail")
    with pytest.raises(StartFailed, match="child 'c' failed to start: c cannot start") as caught:
        async with open_supervisor("root", [cast.spec(name) for name in "abcd"]):
            pytest.fail("the body must not run")
    assert isinstance(caught.value.cause, cast.Boom)
    assert cast.log == ["start a", "start b", "start c", "stop b", "stop a"]


async def test_start_child_that_fails_is_not_kept(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("b", "fail")
    async with open_supervisor("root", [cast.spec("a")], intensity=0) as supervisor:
        with pytest.raises(StartFailed, match="b cannot start"):
            await supervisor.start_child(cast.spec("b"))
        assert [child.child_id for child in supervisor.which_children()] == ["a"]
        assert (await supervisor.start_child(cast.spec("b"))).status is ChildStatus.RUNNING


async def test_a_child_that_returns_before_it_is_ready_failed(autojump_clock: MockClock) -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await trio.lowlevel.checkpoint()

    with pytest.raises(StartFailed, match="child 'a' failed to start: ended before it was ready"):
        async with open_supervisor("root", [ChildSpec("a", run)]):
            pytest.fail("the body must not run")


async def test_the_cause_is_found_inside_of_nested_groups(autojump_clock: MockClock) -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)

    async def fail() -> None:
        raise FileNotFoundError("no such model")

    with pytest.raises(StartFailed, match="no such model") as caught:
        async with open_supervisor("root", [ChildSpec("a", run)]):
            pytest.fail("the body must not run")
    assert isinstance(caught.value.cause, FileNotFoundError)


async def test_started_twice_is_an_error_of_the_child(autojump_clock: MockClock) -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        task_status.started()

    async with open_supervisor("root", [ChildSpec("a", run, restart=Restart.TEMPORARY)]) as supervisor:
        await wait_all_tasks_blocked()
        assert supervisor.which_children() == ()


async def test_default_values_of_specs(cast: Any) -> None:
    worker = cast.spec("a")
    assert (worker.restart, worker.shutdown, worker.kind) == (Restart.PERMANENT, 5.0, Kind.WORKER)
    assert (worker.significant, worker.kill) == (False, None)
    nested = supervisor_child("s")
    assert (nested.restart, nested.shutdown, nested.kind) == (Restart.PERMANENT, INFINITY, Kind.SUPERVISOR)
    async with open_supervisor("root", [worker, nested]) as supervisor:
        assert supervisor.get_childspec("a") is worker
        assert supervisor.get_childspec("s") is nested


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restart": "sometimes"}, "sometimes"),
        ({"shutdown": -1.0}, "shutdown must be 0 or more seconds, got -1"),
        ({"shutdown": float("nan")}, "got nan"),
        ({"kind": "boss"}, "boss"),
        ({"run": 7}, "run must be an async function, got 7"),
        ({"significant": True}, "must be transient or temporary"),
    ],
)
def test_faulty_specs(options: dict[str, Any], message: str) -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await trio.sleep_forever()

    with pytest.raises(ValueError, match=message):
        ChildSpec(**{"child_id": "a", "run": run, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "none_for_one"}, "none_for_one"),
        ({"intensity": -1}, "intensity must be at least 0, got -1"),
        ({"period": 0}, "period must be more than 0 seconds, got 0"),
        ({"auto_shutdown": "perhaps"}, "perhaps"),
    ],
)
async def test_faulty_flags(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        async with open_supervisor("root", **options):
            pytest.fail("the body must not run")


async def test_flags_and_specs_that_do_not_fit(cast: Any) -> None:
    significant = cast.spec("a", restart=Restart.TRANSIENT, significant=True)
    with pytest.raises(InvalidSpec, match="child 'a' is significant, but 'root' has auto_shutdown never"):
        async with open_supervisor("root", [significant]):
            pytest.fail("the body must not run")
    with pytest.raises(InvalidSpec, match="'root' has 2 children called 'a'"):
        async with open_supervisor("root", [cast.spec("a"), cast.spec("a")]):
            pytest.fail("the body must not run")
    async with open_supervisor("root") as supervisor:
        with pytest.raises(InvalidSpec, match="is significant"):
            await supervisor.start_child(significant)
    assert cast.log == []


def test_plain_words_do_for_enums() -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await trio.sleep_forever()

    spec = ChildSpec("a", run, restart="transient", shutdown=BRUTAL_KILL)  # type: ignore[arg-type]
    assert spec.restart is Restart.TRANSIENT


async def test_cancelling_a_start_that_hangs(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("b", "hang")
    with trio.move_on_after(10) as scope:
        async with open_supervisor("root", [cast.spec("a"), cast.spec("b"), cast.spec("c")]):
            pytest.fail("the body must not run")
    assert scope.cancelled_caught
    assert cast.log == ["start a", "start b", "stop a"]


async def test_cancelling_start_child_takes_the_child_back(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("b", "hang")
    async with open_supervisor("root", [cast.spec("a")]) as supervisor:
        with trio.move_on_after(10) as scope:
            await supervisor.start_child(cast.spec("b"))
        assert scope.cancelled_caught
        await wait_all_tasks_blocked()
        assert [child.child_id for child in supervisor.which_children()] == ["a"]
        assert (await supervisor.start_child(cast.spec("b"))).value == 2


async def test_reading_works_while_a_child_hangs_in_its_start(
    cast: Any, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    cast.opening("b", "hang")
    async with open_supervisor("root", [cast.spec("a")]) as supervisor:
        nursery.start_soon(supervisor.start_child, cast.spec("b"))
        await wait_all_tasks_blocked()
        assert [child.status for child in supervisor.which_children()] == ["running", "starting"]
        assert await supervisor.terminate_child("b") is None
        await wait_all_tasks_blocked()


async def test_children_see_the_context_of_the_opener_and_their_own_lifetime(
    autojump_clock: MockClock,
) -> None:
    from ullm.supervision.actor import current_lifetime

    names: list[str] = []

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        lifetime = current_lifetime()
        names.append(lifetime.name if lifetime is not None else "none")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(grandchild)

    async def grandchild() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with cleanup_scope() as scope:
                names.append(f"{scope.deadline - trio.current_time():g} s left")

    nested = supervisor_child("s", [ChildSpec("a", run, shutdown=7.0)])
    async with open_supervisor("root", [nested]):
        await wait_all_tasks_blocked()
        assert names == ["a"]
    assert names == ["a", "7 s left"]
    assert current_lifetime() is None
