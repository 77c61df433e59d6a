"""Many alike children that come and go (OTP's simple_one_for_one cases), and what they cost."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import ChildCounts, ChildSpec, ChildStatus, Restart, Strategy, open_supervisor
from ullm.supervision.errors import ChildConflict, ChildNotFound, RestartLimitReached
from ullm.supervision.shutdown import SETTLE

DYNAMIC: Any = {"strategy": Strategy.DYNAMIC, "intensity": 2, "period": 3600.0}


async def test_ids_are_made_unique(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", **DYNAMIC) as supervisor:
        infos = [await supervisor.start_child(cast.spec("session")) for _ in range(3)]
        assert [info.child_id for info in infos] == ["session#1", "session#2", "session#3"]
        assert supervisor.which_children() == tuple(infos)
        with pytest.raises(ChildNotFound):
            await supervisor.terminate_child("session")


async def test_administration(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", **DYNAMIC) as supervisor:
        first = await supervisor.start_child(cast.spec("a"))
        second = await supervisor.start_child(cast.spec("b"))
        await supervisor.terminate_child(first.child_id)
        assert supervisor.which_children() == (second,)
        assert supervisor.count_children() == ChildCounts(1, 1, 0, 0, 1)
        with pytest.raises(ChildNotFound):  # terminated children are forgotten
            await supervisor.restart_child(first.child_id)
        with pytest.raises(ChildConflict, match="is running"):
            await supervisor.delete_child(second.child_id)


@pytest.mark.parametrize(
    ("restart", "how", "remain"),
    [
        (Restart.PERMANENT, "end", 1),
        (Restart.TRANSIENT, "end", 0),
        (Restart.TRANSIENT, "crash", 1),
        (Restart.TEMPORARY, "crash", 0),
    ],
)
async def test_ended_children_are_forgotten(
    cast: Any, autojump_clock: MockClock, restart: Restart, how: str, remain: int
) -> None:
    async with open_supervisor("root", **DYNAMIC) as supervisor:
        await supervisor.start_child(cast.spec("a", restart=restart))
        await getattr(cast, how)("a")
        assert len(supervisor.which_children()) == remain
        assert cast.lives["a"] == 1 + remain


async def test_restart_leaves_the_others_alone(cast: Any, autojump_clock: MockClock) -> None:
    async def live() -> None:
        async with open_supervisor("root", **DYNAMIC) as supervisor:
            await supervisor.start_child(cast.spec("a"))
            await supervisor.start_child(cast.spec("b"))
            await cast.crash("a")
            assert [child.value for child in supervisor.which_children()] == [2, 1]
            await cast.crash("b")
            await cast.crash("a")
            pytest.fail("the third restart is one too many")

    with pytest.raises(RestartLimitReached):
        await live()


async def test_children_stop_at_the_same_time(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", **DYNAMIC) as supervisor:
        for seconds in (1.0, 1.0, 5.0):  # the last has its cleanup cut short after 2 s
            await supervisor.start_child(cast.tidy(f"{seconds:g} s", seconds, shutdown=2.0))
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(2.0, abs=SETTLE)
    assert cast.log == ["stop 1 s", "stop 1 s", "cut short 5 s"]


async def test_hanging_restart_loop(cast: Any, autojump_clock: MockClock) -> None:
    options: Any = {**DYNAMIC, "intensity": 8, "restart_delay": lambda _: 2.0}
    async with open_supervisor("root", **options) as supervisor:
        child = await supervisor.start_child(cast.spec("a"))
        cast.opening("a", always="fail")
        await cast.crash("a")
        assert [info.status for info in supervisor.which_children()] == [ChildStatus.RESTARTING]
        assert supervisor.count_children() == ChildCounts(1, 0, 1, 0, 1)
        await supervisor.terminate_child(child.child_id)
        assert supervisor.which_children() == ()
        tries = cast.lives["a"]
        await trio.sleep(60)
        assert cast.lives["a"] == tries


async def test_count_children(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", **DYNAMIC) as supervisor:
        for number in range(1000):
            await supervisor.start_child(cast.spec(f"c{number}", restart=Restart.TEMPORARY))
        assert supervisor.count_children() == ChildCounts(1000, 1000, 0, 0, 1000)
        for number in range(1000):
            cast.tell(f"c{number}", None)
        await wait_all_tasks_blocked()
        assert supervisor.count_children() == ChildCounts(0, 0, 0, 0, 0)


async def idle(*, task_status: trio.TaskStatus[None]) -> None:
    """A child that does nothing."""
    task_status.started()
    await trio.sleep_forever()


async def cost(number: int, strategy: Strategy, end: str) -> float:
    """CPU seconds per child to start ``number`` children and end them."""
    began = time.process_time()
    async with open_supervisor("root", strategy=strategy) as supervisor:
        infos = [
            await supervisor.start_child(ChildSpec(f"c{n}", idle, restart=Restart.TEMPORARY))
            for n in range(number)
        ]
        if end == "terminate":
            for info in infos:
                await supervisor.terminate_child(info.child_id)
        assert supervisor.count_children().active == (0 if end == "terminate" else number)
    return (time.process_time() - began) / number


@pytest.fixture
def _uncollected() -> Iterator[None]:
    """The collector's share depends on what else the test process holds."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_uncollected")
@pytest.mark.parametrize("end", ["stop", "terminate"])
@pytest.mark.parametrize(
    "strategy", [Strategy.DYNAMIC, pytest.param(Strategy.ONE_FOR_ONE, marks=pytest.mark.slow)]
)
async def test_cost_is_nearly_linear(strategy: Strategy, end: str) -> None:
    small = await cost(500, strategy, end)
    large = await cost(5_000, strategy, end)
    assert large < 5 * small  # linear would be 1; quadratic 10


@pytest.mark.usefixtures("_uncollected")
@pytest.mark.parametrize(
    "number", [pytest.param(10_000, marks=pytest.mark.slow), pytest.param(100_000, marks=pytest.mark.long)]
)
async def test_many_children(autojump_clock: MockClock, number: int) -> None:
    small = await cost(number // 100, Strategy.DYNAMIC, "stop")
    large = await cost(number, Strategy.DYNAMIC, "stop")
    assert large < 10 * small  # linear would be 1; quadratic 100
