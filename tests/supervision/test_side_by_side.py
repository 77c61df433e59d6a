"""No start holds up another but those at the beginning, and what would wait for itself is told so."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import (
    ChildSpec,
    StartDeadlock,
    StartFailed,
    Strategy,
    Supervisor,
    open_supervisor,
    supervisor_child,
)


def statuses(supervisor: Supervisor) -> dict[str, str]:
    return {child.child_id: child.status.value for child in supervisor.which_children()}


class Stage:
    """A supervisor whose children can reach it."""

    supervisor: Supervisor

    def opened(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor


# --- a child that terminates itself ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", list(Strategy), ids=str)
@pytest.mark.parametrize("life", [1, 2])
async def test_a_child_that_terminates_itself_when_it_is_ready_stays_down(
    autojump_clock: MockClock, strategy: Strategy, life: int
) -> None:
    stage, lives = Stage(), 0

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        nonlocal lives
        lives += 1
        task_status.started()
        if lives < life:
            raise OSError("first")
        await stage.supervisor.terminate_child(stage.supervisor.which_children()[0].child_id)

    async with open_supervisor(
        "root", [ChildSpec("a", run)], strategy=strategy, intensity=3, on_opened=stage.opened
    ) as supervisor:
        await trio.sleep(60)
        assert lives == life
        assert list(statuses(supervisor).values()) == ([] if strategy is Strategy.DYNAMIC else ["stopped"])


# --- starts side by side -----------------------------------------------------------------------------------


async def test_a_start_by_call_that_hangs_holds_up_no_other(
    cast: Any, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with open_supervisor("root", [cast.spec("a"), cast.spec("b")]) as supervisor:
        await supervisor.terminate_child("b")
        cast.opening("hangs", "hang")
        nursery.start_soon(supervisor.start_child, cast.spec("hangs", start_timeout=60.0))
        await wait_all_tasks_blocked()
        before = trio.current_time()
        await supervisor.start_child(cast.spec("c"))
        await supervisor.restart_child("b")
        await cast.crash("a")
        assert trio.current_time() == before
        assert statuses(supervisor) == {"a": "running", "b": "running", "hangs": "starting", "c": "running"}
        await supervisor.terminate_child("hangs")


async def test_each_start_fails_and_is_taken_back_for_itself(
    cast: Any, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    failed: list[str] = []

    async def start(child_id: str, seconds: float) -> None:
        with trio.move_on_after(seconds):
            try:
                await supervisor.start_child(cast.spec(child_id, start_timeout=10.0))
            except StartFailed as error:
                failed.append(error.child_id)

    async with open_supervisor("root") as supervisor:
        for child_id in ("late", "withdrawn"):
            cast.opening(child_id, "hang")
        cast.opening("slow", "slow")
        nursery.start_soon(start, "late", 60.0)
        nursery.start_soon(start, "withdrawn", 5.0)
        nursery.start_soon(start, "slow", 60.0)
        await trio.sleep(2)
        assert sorted(statuses(supervisor).items()) == [
            ("late", "starting"),
            ("slow", "running"),
            ("withdrawn", "starting"),
        ]
        await trio.sleep(4)
        assert sorted(statuses(supervisor)) == ["late", "slow"]
        await trio.sleep(5)
        assert statuses(supervisor) == {"slow": "running"}
    assert failed == ["late"]


async def test_the_first_children_start_in_order_before_all_others(
    cast: Any, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    stage = Stage()
    cast.opening("a", "slow")
    cast.opening("b", "slow")

    async def start_soon() -> None:
        await trio.sleep(0.5)
        await stage.supervisor.start_child(cast.spec("c"))

    nursery.start_soon(start_soon)
    specs = [cast.spec("a"), cast.spec("b")]
    async with open_supervisor("root", specs, on_opened=stage.opened) as supervisor:
        await wait_all_tasks_blocked()
        assert cast.log == ["start a", "start b", "start c"]
        assert trio.current_time() == 2.0
        assert list(statuses(supervisor)) == ["a", "b", "c"]


# --- what would wait for itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["start", "restart"])
@pytest.mark.parametrize("nested", [False, True])
async def test_a_child_that_asks_for_a_start_before_it_is_ready_is_told(
    cast: Any, autojump_clock: MockClock, how: str, nested: bool
) -> None:
    stage = Stage()

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        if how == "start":
            await stage.supervisor.start_child(cast.spec("b"))
        await stage.supervisor.restart_child("b")

    child = supervisor_child("a", [ChildSpec("inner", run)]) if nested else ChildSpec("a", run)
    with pytest.raises(StartFailed) as caught:
        async with open_supervisor("root", [child], on_opened=stage.opened):
            pytest.fail("the body must not run")
    cause: BaseException | None = caught.value.cause
    cause = cause.cause if isinstance(cause, StartFailed) else cause
    assert isinstance(cause, StartDeadlock)
    assert "child 'a' cannot have supervisor 'root' start a child before it is ready itself" in str(cause)
    assert trio.current_time() == 0.0


async def test_a_task_beside_the_child_may_wait_for_a_start(cast: Any, autojump_clock: MockClock) -> None:
    stage = Stage()

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.supervisor.start_child, cast.spec("b"))
            await trio.sleep(1)
            task_status.started()
            await trio.sleep_forever()

    async with open_supervisor("root", [ChildSpec("a", run)], on_opened=stage.opened) as supervisor:
        await wait_all_tasks_blocked()
        assert "b" in statuses(supervisor)


async def test_a_later_child_may_have_others_started_before_it_is_ready(
    cast: Any, autojump_clock: MockClock
) -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await supervisor.start_child(cast.spec("b"))
        task_status.started()
        await trio.sleep_forever()

    async with open_supervisor("root", [cast.spec("first")]) as supervisor:
        await supervisor.start_child(ChildSpec("a", run))
        assert statuses(supervisor) == {"first": "running", "a": "running", "b": "running"}
