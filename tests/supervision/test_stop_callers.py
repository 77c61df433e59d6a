"""Who may ask for a stop, and races between stops and everything else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import (
    INFINITY,
    ChildReport,
    ChildSpec,
    Strategy,
    open_supervisor,
)
from ullm.supervision.errors import RestartLimitReached


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
    assert cast.outcomes(reports) == [("a", "stopped")]
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
    assert cast.outcomes(supervisor.reports) == [("b", "stopped"), ("a", "stopped")]


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
    assert cast.outcomes(reports) == [("b", "failed" if how == "crash" else "stopped"), ("a", "stopped")]
    assert supervisor.failure is None


async def test_a_child_that_crashes_while_others_stop_is_not_restarted(
    cast: Any, autojump_clock: MockClock
) -> None:
    async with open_supervisor("root", [cast.spec("a"), cast.tidy("b", 5.0)]) as supervisor:
        supervisor.request_stop()
        await trio.sleep(1)
        await cast.crash("a")
    assert cast.lives["a"] == 1
    assert cast.outcomes(supervisor.reports) == [("b", "stopped"), ("a", "failed")]


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
