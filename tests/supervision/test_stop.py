"""Stopping: reverse order, budgets, force, abandonment (OTP's sup_stop cases)."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from ullm.supervision import (
    BRUTAL_KILL,
    INFINITY,
    ChildReport,
    ChildSpec,
    Restart,
    Strategy,
    open_supervisor,
)
from ullm.supervision.shutdown import KILL_GRACE, SETTLE


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
    assert cast.outcomes(supervisor.reports) == [("child2", "stopped"), ("child1", "stopped")]
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
    assert cast.outcomes(supervisor.reports) == [("child2", "killed"), ("child1", "stopped")]
    assert trio.current_time() - began == pytest.approx(1.0 + SETTLE)


async def test_stop_brutal_kill(cast: Any, autojump_clock: MockClock) -> None:
    release = trio.Event()
    brutal = cast.stubborn("child2", release, shutdown=BRUTAL_KILL, kill=release.set)
    async with open_supervisor("root", [cast.spec("child1"), brutal]) as supervisor:
        began = trio.current_time()
    assert cast.outcomes(supervisor.reports) == [("child2", "killed"), ("child1", "stopped")]
    assert trio.current_time() == began


async def test_brutal_kill_gives_cleanup_no_time(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", [cast.tidy("a", 1.0, shutdown=BRUTAL_KILL)]) as supervisor:
        began = trio.current_time()
    assert cast.log == ["cut short a"]
    assert cast.outcomes(supervisor.reports) == [("a", "killed")]
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
    assert cast.outcomes(supervisor.reports) == [("b", "abandoned"), ("a", "stopped")]
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
    assert cast.outcomes(supervisor.reports) == [("a", "stopped"), ("b", "abandoned")]
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
    assert cast.outcomes(supervisor.reports) == [("b", "failed"), ("a", "stopped")]
