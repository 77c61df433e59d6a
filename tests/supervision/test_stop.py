"""Stopping: reverse order, budgets, one deadline, force, abandonment, races (OTP's sup_stop cases)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.errors import RestartLimitReached
from ullm.supervision import (
    BRUTAL_KILL,
    INFINITY,
    ChildReport,
    ChildSpec,
    Restart,
    Strategy,
    Supervisor,
    cleanup_scope,
    open_supervisor,
)
from ullm.supervision.shutdown import KILL_GRACE, SETTLE


def outcomes(reports: tuple[ChildReport, ...]) -> list[tuple[str, str]]:
    return [(report.child_id, report.outcome) for report in reports]


async def test_children_stop_in_reverse_order_one_after_another(cast: Any, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    async with open_supervisor("root", [cast.tidy(name, 1.0) for name in "abc"]) as supervisor:
        pass
    assert cast.log == ["stop c", "stop b", "stop a"]
    assert trio.current_time() - began == 3.0
    assert [(report.child_id, report.seconds) for report in supervisor.reports] == [
        ("c", 1.0),
        ("b", 1.0),
        ("a", 1.0),
    ]


async def test_stop_infinity(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.tidy("child1", 1000.0, shutdown=INFINITY), cast.tidy("child2", 1000.0, shutdown=INFINITY)]
    async with open_supervisor("root", specs) as supervisor:
        pass
    assert outcomes(supervisor.reports) == [("child2", "stopped"), ("child1", "stopped")]
    assert [report.seconds for report in supervisor.reports] == [1000.0, 1000.0]


async def test_stop_timeout(cast: Any, autojump_clock: MockClock) -> None:
    """A child whose cleanup takes too long has it cut short at its deadline; others are not affected."""
    specs = [cast.tidy("child1", 0.5, shutdown=1.0), cast.tidy("child2", 200.0, shutdown=1.0)]
    async with open_supervisor("root", specs) as supervisor:
        pass
    assert cast.log == ["cut short child2", "stop child1"]
    assert [report.seconds for report in supervisor.reports] == [1.0, 0.5]


async def test_stop_timeout_uses_the_kill_hook(cast: Any, autojump_clock: MockClock) -> None:
    release = trio.Event()
    stubborn = cast.stubborn("child2", release, shutdown=1.0, kill=release.set)
    async with open_supervisor("root", [cast.spec("child1"), stubborn]) as supervisor:
        began = trio.current_time()
    assert outcomes(supervisor.reports) == [("child2", "killed"), ("child1", "stopped")]
    assert trio.current_time() - began == pytest.approx(1.0 + SETTLE)


async def test_stop_brutal_kill(cast: Any, autojump_clock: MockClock) -> None:
    release = trio.Event()
    brutal = cast.stubborn("child2", release, shutdown=BRUTAL_KILL, kill=release.set)
    async with open_supervisor("root", [cast.spec("child1"), brutal]) as supervisor:
        began = trio.current_time()
    assert outcomes(supervisor.reports) == [("child2", "killed"), ("child1", "stopped")]
    assert trio.current_time() == began


async def test_brutal_kill_gives_cleanup_no_time(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", [cast.tidy("a", 1.0, shutdown=BRUTAL_KILL)]):
        began = trio.current_time()
    assert cast.log == ["cut short a"]
    assert trio.current_time() == began


@pytest.mark.parametrize("strategy", [Strategy.ONE_FOR_ONE, Strategy.DYNAMIC])
async def test_a_child_that_ignores_everything_is_abandoned(
    cast: Any, autojump_clock: MockClock, strategy: Strategy
) -> None:
    release, killed, told = trio.Event(), trio.Event(), list[ChildReport]()
    specs = [cast.spec("a"), cast.stubborn("b", release, shutdown=2.0, kill=killed.set)]
    async with open_supervisor("root", specs, strategy=strategy, on_abandoned=told.append) as supervisor:
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(2.0 + SETTLE + KILL_GRACE)
    assert killed.is_set()
    (abandoned,) = (report for report in supervisor.reports if report.outcome == "abandoned")
    assert told == [abandoned]
    assert abandoned.detail == "ignored cancellation and its kill hook"
    assert abandoned.seconds == pytest.approx(2.0 + SETTLE + KILL_GRACE)
    release.set()


async def test_hooks_that_raise_are_reported_and_do_no_harm(cast: Any, autojump_clock: MockClock) -> None:
    release = trio.Event()

    def kill() -> None:
        raise OSError("no such process")

    def on_abandoned(report: ChildReport) -> None:
        raise ValueError("a bug in the embedding program")

    specs = [cast.spec("a"), cast.stubborn("b", release, shutdown=1.0, kill=kill)]
    async with open_supervisor("root", specs, on_abandoned=on_abandoned) as supervisor:
        pass
    assert supervisor.reports[0].detail == "kill hook raised OSError: no such process"
    assert outcomes(supervisor.reports) == [("b", "abandoned"), ("a", "stopped")]
    release.set()


async def test_an_abandoned_sibling_does_not_keep_a_restart_from_happening(
    cast: Any, autojump_clock: MockClock
) -> None:
    release = trio.Event()
    specs = [cast.spec("a"), cast.stubborn("b", release, shutdown=1.0, restart=Restart.TEMPORARY)]
    async with open_supervisor("root", specs, strategy=Strategy.ONE_FOR_ALL) as supervisor:
        await cast.crash("a")
        await trio.sleep(5)
        assert [child.value for child in supervisor.which_children()] == [2]
    assert outcomes(supervisor.reports) == [("a", "stopped"), ("b", "abandoned")]
    release.set()


async def test_an_exception_during_the_stop_is_reported(cast: Any, autojump_clock: MockClock) -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            raise OSError("disk full")

    async with open_supervisor("root", [cast.spec("a"), ChildSpec("b", run)]) as supervisor:
        pass
    assert supervisor.reports[0] == ChildReport("b", "failed", 0.0, "OSError: disk full")
    assert outcomes(supervisor.reports) == [("b", "failed"), ("a", "stopped")]


# --- one deadline --------------------------------------------------------------------------------


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
    assert outcomes(reports) == [("c", "stopped"), ("b", "stopped"), ("a", "stopped")]


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

    nested = ChildSpec.supervisor("nested", [ChildSpec("a", run, shutdown=50.0)])
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

    nested = ChildSpec.supervisor("nested", [hook("c"), hook("d")])
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
    assert outcomes(supervisor.reports) == [("b", "killed"), ("a", "stopped")]
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


# --- who asks ------------------------------------------------------------------------------------


async def test_cancelling_the_surrounding_scope(cast: Any, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    with trio.move_on_after(5) as scope:
        async with open_supervisor("root", [cast.tidy("a", 1.0), cast.tidy("b", 1.0)]):
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert cast.log == ["stop b", "stop a"]
    assert trio.current_time() - began == 7.0


async def test_cancellation_does_not_wait_for_the_body(cast: Any, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    with trio.move_on_after(5):
        async with open_supervisor("root", [cast.tidy("a", 1.0)]) as supervisor:
            with trio.CancelScope(shield=True):
                await supervisor.wait_stopped()
                assert trio.current_time() - began == 6.0


async def test_the_shutdown_timeout_counts_from_the_cancellation(
    cast: Any, autojump_clock: MockClock
) -> None:
    began = trio.current_time()
    with trio.move_on_after(5):
        async with open_supervisor(
            "root", [cast.tidy("a", 100.0, shutdown=INFINITY)], shutdown_timeout=10.0
        ) as supervisor:
            with trio.CancelScope(shield=True):
                await trio.sleep(9)
    assert trio.current_time() - began == pytest.approx(15.0)
    assert supervisor.reports[0].seconds == pytest.approx(10.0)


async def test_on_cancelled_replaces_the_stop_at_once(cast: Any, autojump_clock: MockClock) -> None:
    """A program that has to drain first is told, and ends its body by itself."""
    drained = trio.Event()
    told: list[Supervisor] = []

    def on_cancelled(supervisor: Supervisor) -> None:
        told.append(supervisor)
        drained.set()

    with trio.move_on_after(5):
        async with open_supervisor("root", [cast.spec("a")], on_cancelled=on_cancelled) as supervisor:
            with trio.CancelScope(shield=True):
                await drained.wait()
                await trio.sleep(3)
                assert not supervisor.stopping
    assert told == [supervisor]
    assert cast.log == ["start a", "stop a"]


async def test_an_exception_of_the_body_stops_the_tree_and_comes_out_as_it_is(
    cast: Any, autojump_clock: MockClock
) -> None:
    async def live() -> None:
        async with open_supervisor("root", [cast.spec("a")]):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await live()
    assert cast.log == ["start a", "stop a"]


async def test_a_failure_cancels_the_body(cast: Any, autojump_clock: MockClock) -> None:
    async def live() -> None:
        async with open_supervisor("root", [cast.spec("a")], intensity=0):
            try:
                await cast.crash("a")
                await trio.sleep_forever()
            finally:
                cast.log.append("body ends")

    with pytest.raises(RestartLimitReached):
        await live()
    assert cast.log[-1] == "body ends"


async def test_a_failure_comes_before_what_the_body_makes_of_it(cast: Any, autojump_clock: MockClock) -> None:
    async def live() -> None:
        async with open_supervisor("root", [cast.spec("a")], intensity=0):
            cast.tell("a", cast.Boom())
            try:
                await trio.sleep_forever()
            finally:
                raise KeyError("mine")

    with pytest.raises(RestartLimitReached) as caught:
        await live()
    assert caught.value.__notes__ == ["Meanwhile the body of 'root' raised KeyError: 'mine'"]


async def test_stop_in_the_body_leaves_the_body_alone(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", [cast.spec("a")]) as supervisor:
        reports = await supervisor.stop()
        await trio.sleep(1)
        cast.log.append("body ends")
    assert outcomes(reports) == [("a", "stopped")]
    assert cast.log[-1] == "body ends"


async def test_a_child_may_stop_its_own_supervisor(cast: Any, autojump_clock: MockClock) -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await go.wait()
        await supervisor.stop()

    go = trio.Event()
    async with open_supervisor("root", [ChildSpec("a", run), cast.spec("b")]) as supervisor:
        go.set()
        await supervisor.wait_stopped()
    assert outcomes(supervisor.reports) == [("b", "stopped"), ("a", "stopped")]


# --- races ---------------------------------------------------------------------------------------


async def test_many_stops_at_the_same_time(
    cast: Any, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with open_supervisor("root", [cast.tidy("a", 1.0)]) as supervisor:
        results: list[tuple[ChildReport, ...]] = []

        async def stop() -> None:
            results.append(await supervisor.stop())

        for _ in range(10):
            nursery.start_soon(stop)
        await supervisor.wait_stopped()
        await wait_all_tasks_blocked()
    assert results == [supervisor.reports] * 10
    assert cast.log == ["stop a"]


async def test_cancelling_the_caller_of_stop_does_not_cancel_the_stop(
    cast: Any, autojump_clock: MockClock
) -> None:
    async with open_supervisor("root", [cast.tidy("a", 3.0)]) as supervisor:
        with trio.move_on_after(1) as scope:
            await supervisor.stop()
        assert scope.cancelled_caught
        await supervisor.wait_stopped()
    assert cast.log == ["stop a"]


@pytest.mark.parametrize("how", ["crash", "end", "shutdown"])
async def test_a_child_that_ends_as_the_stop_begins(cast: Any, autojump_clock: MockClock, how: str) -> None:
    async with open_supervisor("root", [cast.spec("a"), cast.spec("b")], intensity=0) as supervisor:
        cast.tell("b", cast.Boom("boom") if how == "crash" else None)
        reports = await supervisor.stop()
    assert outcomes(reports) == [("b", "failed" if how == "crash" else "stopped"), ("a", "stopped")]
    assert supervisor.failure is None


async def test_a_child_that_crashes_while_others_stop_is_not_restarted(
    cast: Any, autojump_clock: MockClock
) -> None:
    async with open_supervisor("root", [cast.spec("a"), cast.tidy("b", 5.0)]) as supervisor:
        supervisor.request_stop()
        await trio.sleep(1)
        await cast.crash("a")
    assert cast.lives["a"] == 1
    assert outcomes(supervisor.reports) == [("b", "stopped"), ("a", "failed")]


async def test_a_stop_while_a_child_is_being_terminated(
    cast: Any, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """The termination goes on with what is left of its time, and is not begun anew."""
    specs = [cast.tidy("a", 100.0, shutdown=INFINITY), cast.spec("b")]

    async def terminate() -> None:
        with pytest.raises(Exception, match="is stopping"):
            await supervisor.terminate_child("a")

    async with open_supervisor("root", specs) as supervisor:
        began = trio.current_time()
        nursery.start_soon(terminate)
        await trio.sleep(1)
        await supervisor.stop(began + 10.0)
        assert trio.current_time() - began <= 10.0
    assert cast.log[-2:] == ["cut short a", "stop b"]


async def test_a_stop_while_a_group_restarts(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.spec("a"), cast.tidy("b", 3.0), cast.tidy("c", 3.0)]
    async with open_supervisor("root", specs, strategy=Strategy.ONE_FOR_ALL) as supervisor:
        await cast.crash("a")  # c is being stopped for it
        await supervisor.stop(trio.current_time() + math.inf)
    assert cast.lives["a"] == 1
    assert cast.log == ["start a", "stop a", "stop c", "stop b"]


async def test_a_supervisor_that_gives_up_stops_within_an_outer_deadline(
    cast: Any, autojump_clock: MockClock
) -> None:
    async def live() -> None:
        specs = [cast.tidy("slow", 100.0, shutdown=INFINITY), cast.spec("a")]
        async with open_supervisor("root", specs, intensity=0) as supervisor:
            await cast.crash("a")
            supervisor.request_stop(trio.current_time() + 5.0)
            await trio.sleep_forever()

    began = trio.current_time()
    with pytest.raises(RestartLimitReached):
        await live()
    assert trio.current_time() - began <= 100.0
