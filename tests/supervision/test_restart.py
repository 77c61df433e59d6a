"""Who is restarted when, and when a supervisor gives up (OTP's restart and escalation cases)."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import (
    ChildCounts,
    ChildStatus,
    Restart,
    Strategy,
    open_supervisor,
)
from ullm.supervision.errors import RestartLimitReached

HOUR = 3600.0


@pytest.mark.parametrize(
    ("restart", "how", "expected"),
    [
        ("permanent", "end", "restarted"),
        ("permanent", "shutdown", "restarted"),
        ("permanent", "crash", "restarted"),
        ("transient", "end", "stopped"),
        ("transient", "shutdown", "stopped"),
        ("transient", "crash", "restarted"),
        ("temporary", "end", "forgotten"),
        ("temporary", "shutdown", "forgotten"),
        ("temporary", "crash", "forgotten"),
    ],
)
async def test_restart_matrix(
    cast: Any, autojump_clock: MockClock, restart: str, how: str, expected: str
) -> None:
    spec = cast.spec("a", restart=Restart(restart))
    async with open_supervisor("root", [spec], intensity=2, period=HOUR) as supervisor:
        await getattr(cast, how)("a")
        children = supervisor.which_children()
        if expected == "forgotten":
            assert children == ()
            return
        (child,) = children
        restarted = expected == "restarted"
        assert child.status is (ChildStatus.RUNNING if restarted else ChildStatus.STOPPED)
        assert (child.restarts, child.value) == ((1, 2) if restarted else (0, None))
        assert supervisor.count_children() == ChildCounts(1, int(restarted), 0, 0, 1)


async def test_temporary_failures_do_not_count(cast: Any, autojump_clock: MockClock) -> None:
    spec = cast.spec("a", restart=Restart.TEMPORARY)
    async with open_supervisor("root", [cast.spec("b")], intensity=0) as supervisor:
        for _ in range(3):
            await supervisor.start_child(spec)
            await cast.crash("a")
        assert len(supervisor.which_children()) == 1


@pytest.mark.parametrize("strategy", [Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE])
async def test_temporary_bystander(cast: Any, autojump_clock: MockClock, strategy: Strategy) -> None:
    specs = [cast.spec("child1"), cast.spec("child2", restart=Restart.TEMPORARY)]
    async with open_supervisor("root", specs, strategy=strategy, intensity=2, period=300) as supervisor:
        cast.clear()
        await cast.end("child1")
        assert cast.log == ["stop child1", "stop child2", "start child1"]
        assert [child.child_id for child in supervisor.which_children()] == ["child1"]


async def test_multiple_restarts_within_the_intensity(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", [cast.spec("a")], intensity=1, period=1) as supervisor:
        for _ in range(4):
            await cast.crash("a")
            await trio.sleep(2.1)
        assert supervisor.which_children()[0].restarts == 4


async def test_intensity_window_on_the_virtual_clock(cast: Any, autojump_clock: MockClock) -> None:
    async def live() -> None:
        async with open_supervisor("root", [cast.spec("a")], intensity=2, period=10):
            for _ in range(6):  # two within any 10 s
                await cast.crash("a")
                await trio.sleep(5.5)
            await cast.crash("a")
            await trio.sleep(5.5)
            cast.tell("a", cast.Boom("two at once"))
            await wait_all_tasks_blocked()
            cast.tell("a", cast.Boom("three"))
            await trio.sleep(1)
            pytest.fail("it should have given up")

    with pytest.raises(RestartLimitReached, match="more than 2 restarts within 10 s"):
        await live()
    assert cast.lives["a"] == 9


async def test_the_failure_names_the_last_cause(cast: Any, autojump_clock: MockClock) -> None:
    async def live() -> None:
        async with open_supervisor("root", [cast.spec("a")], intensity=0, period=60):
            cast.tell("a", cast.Boom("out of memory"))
            await trio.sleep_forever()

    with pytest.raises(RestartLimitReached) as caught:
        await live()
    error = caught.value
    assert str(error) == (
        "supervisor 'root': more than 0 restarts within 60 s; last cause: child 'a': out of memory"
    )
    assert isinstance(error.cause, cast.Boom)
    assert (error.child_id, error.__cause__) == ("a", error.cause)


async def test_the_failure_of_a_child_that_returned(cast: Any, autojump_clock: MockClock) -> None:
    async def live() -> None:
        async with open_supervisor("root", [cast.spec("a")], intensity=0):
            cast.tell("a", None)
            await trio.sleep_forever()

    with pytest.raises(RestartLimitReached, match="last cause: child 'a': ended"):
        await live()


async def test_one_for_one(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.spec("child1"), cast.spec("child2")]

    async def live() -> None:
        async with open_supervisor("root", specs, intensity=2, period=HOUR) as supervisor:
            cast.clear()
            await cast.crash("child1")
            assert cast.log == ["stop child1", "start child1"]
            assert [child.value for child in supervisor.which_children()] == [2, 1]
            await cast.crash("child2")
            await cast.crash("child1")
            pytest.fail("the third restart is one too many")

    with pytest.raises(RestartLimitReached):
        await live()
    assert cast.log[-2:] == ["stop child1", "stop child2"]


@pytest.mark.parametrize(
    ("strategy", "failing"),
    [
        (Strategy.ONE_FOR_ONE, "child1"),
        (Strategy.ONE_FOR_ALL, "child2"),
        (Strategy.REST_FOR_ONE, "child2"),
        (Strategy.DYNAMIC, "child1"),
    ],
)
async def test_escalation_when_a_restart_keeps_failing(
    cast: Any, autojump_clock: MockClock, strategy: Strategy, failing: str
) -> None:
    cast.opening(failing, "ready", always="fail")
    specs = [cast.spec("child1"), cast.spec("child2")]

    async def live() -> None:
        async with open_supervisor("root", specs, strategy=strategy, intensity=4, period=HOUR):
            await cast.crash("child1")
            await trio.sleep_forever()

    with pytest.raises(RestartLimitReached, match=f"{failing} cannot start"):
        await live()
    assert cast.lives[failing] == 1 + 4  # the fifth failure is one too many
    started = sum(line.startswith("start") for line in cast.log)
    assert started - 4 == sum(line.startswith("stop") for line in cast.log)  # whatever started has stopped


async def test_one_for_all(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.spec(name) for name in "abc"]
    options: Any = {"strategy": Strategy.ONE_FOR_ALL, "intensity": 2, "period": HOUR}
    async with open_supervisor("root", specs, **options) as supervisor:
        cast.clear()
        await cast.crash("b")
        assert cast.log == ["stop b", "stop c", "stop a", "start a", "start b", "start c"]
        assert [child.value for child in supervisor.which_children()] == [2, 2, 2]
        assert supervisor.count_children() == ChildCounts(3, 3, 0, 0, 3)


async def test_rest_for_one(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.spec(name) for name in "abcd"]
    options: Any = {"strategy": Strategy.REST_FOR_ONE, "intensity": 2, "period": HOUR}
    async with open_supervisor("root", specs, **options) as supervisor:
        cast.clear()
        await cast.crash("b")
        assert cast.log == ["stop b", "stop d", "stop c", "start b", "start c", "start d"]
        assert [child.value for child in supervisor.which_children()] == [1, 2, 2, 2]


async def test_one_for_one_other_child_fails_restart(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.spec("child1"), cast.spec("child2")]
    async with open_supervisor("root", specs, intensity=3, period=HOUR):
        cast.opening("child2", "fail")
        cast.clear()
        await cast.crash("child1")
        await cast.crash("child2")
        assert cast.log == [
            *("stop child1", "start child1"),
            *("stop child2", "start child2"),  # fails
            "start child2",
        ]


async def test_one_for_all_other_child_fails_restart(cast: Any, autojump_clock: MockClock) -> None:
    """A child that was started again is stopped when a sibling fails to start."""
    specs = [cast.spec("child1"), cast.spec("child2")]
    options: Any = {"strategy": Strategy.ONE_FOR_ALL, "intensity": 3, "period": HOUR}
    async with open_supervisor("root", specs, **options) as supervisor:
        cast.opening("child2", "fail")
        cast.clear()
        await cast.crash("child1")
        assert cast.log == [
            *("stop child1", "stop child2", "start child1", "start child2"),  # fails
            *("stop child1", "start child1", "start child2"),
        ]
        assert supervisor.count_children().active == 2


async def test_rest_for_one_other_child_fails_restart(cast: Any, autojump_clock: MockClock) -> None:
    """A child that was started again stays when a later sibling fails to start."""
    specs = [cast.spec("child1"), cast.spec("child2")]
    options: Any = {"strategy": Strategy.REST_FOR_ONE, "intensity": 3, "period": HOUR}
    async with open_supervisor("root", specs, **options):
        cast.opening("child2", "fail")
        cast.clear()
        await cast.crash("child1")
        assert cast.log == [
            *("stop child1", "stop child2", "start child1", "start child2"),  # fails
            "start child2",
        ]


async def test_several_children_fail_at_once(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.spec(name) for name in "abc"]
    options: Any = {"strategy": Strategy.ONE_FOR_ALL, "intensity": 1, "period": HOUR}
    async with open_supervisor("root", specs, **options) as supervisor:
        for name in "abc":
            cast.tell(name, cast.Boom())
        await wait_all_tasks_blocked()
        assert [child.value for child in supervisor.which_children()] == [2, 2, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_what_ends_programs_ends_the_tree_in_order(
    cast: Any, autojump_clock: MockClock, error: type[BaseException]
) -> None:
    async def live() -> None:
        async with open_supervisor("root", [cast.spec("a"), cast.spec("b")], intensity=9):
            cast.tell("b", error())
            await trio.sleep_forever()

    with pytest.raises(error):
        await live()
    assert cast.log == ["start a", "start b", "stop b", "stop a"]
