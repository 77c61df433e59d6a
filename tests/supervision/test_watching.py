"""Finding children by name, reading their state, hearing of their end, and bounding their number."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import (
    ChildConflict,
    ChildEnd,
    ChildFunction,
    ChildNotFound,
    ChildSpec,
    ExitKind,
    InvalidSpec,
    NameNotFound,
    NameTaken,
    NoState,
    StartFailed,
    Strategy,
    TooManyChildren,
    open_supervisor,
    publish_state,
    supervisor_child,
    whereis,
)

# --- names -------------------------------------------------------------------------------------------------


async def test_a_name_holds_in_the_whole_tree_and_for_one_life(cast: Any, autojump_clock: MockClock) -> None:
    found: list[int] = []

    async def seeker(*, task_status: trio.TaskStatus[None]) -> None:
        found.append(whereis("store"))
        task_status.started()
        await trio.sleep_forever()

    inner = supervisor_child("inner", [cast.spec("a", name="store")])
    async with open_supervisor("root", [inner, ChildSpec("seeker", seeker)]) as supervisor:
        assert found == [1]
        assert supervisor.whereis("store") == 1
        nested = supervisor.which_children()[0].value
        assert nested.whereis("store") == 1
        await cast.crash("a")
        assert supervisor.whereis("store") == 2
        await nested.terminate_child("a")
        with pytest.raises(NameNotFound, match="no child named 'store' is up"):
            supervisor.whereis("store")
        await nested.restart_child("a")
        assert supervisor.whereis("store") == 3
        with pytest.raises(LookupError):
            whereis("store")  # outside of the tree


async def test_trees_share_no_names(cast: Any, autojump_clock: MockClock) -> None:
    async with (
        open_supervisor("one", [cast.spec("a", name="store")]),
        open_supervisor("two", [cast.spec("b", name="store")]) as two,
    ):
        await two.terminate_child("b")
        with pytest.raises(NameNotFound):
            two.whereis("store")


async def test_a_name_that_is_taken(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", [cast.spec("a", name="store")]) as supervisor:
        with pytest.raises(StartFailed, match="the name 'store' is taken by another child") as caught:
            await supervisor.start_child(cast.spec("b", name="store"))
        assert isinstance(caught.value.cause, NameTaken)
        assert supervisor.whereis("store") == 1


async def test_a_child_that_declines_has_no_name(cast: Any, autojump_clock: MockClock) -> None:
    cast.opening("a", "ignore")
    async with open_supervisor("root", [cast.spec("a", name="store")]) as supervisor:
        with pytest.raises(NameNotFound):
            supervisor.whereis("store")


async def test_a_supervisor_can_have_a_name(cast: Any, autojump_clock: MockClock) -> None:
    inner = supervisor_child("inner", [cast.spec("a")], name="workers")
    async with open_supervisor("root", [inner]) as supervisor:
        assert supervisor.whereis("workers").name == "inner"
        assert supervisor.get_childspec("inner").name == "workers"


async def test_an_abandoned_child_leaves_its_name_to_the_next(cast: Any, autojump_clock: MockClock) -> None:
    release = trio.Event()
    stubborn = cast.stubborn("a", release, name="store", shutdown=1.0)
    async with open_supervisor("root", [stubborn]) as supervisor:
        await supervisor.terminate_child("a")
        with pytest.raises(NameNotFound):
            supervisor.whereis("store")
        await supervisor.restart_child("a")
        assert supervisor.whereis("store") is None
        release.set()


# --- state -------------------------------------------------------------------------------------------------


async def test_the_state_of_a_child_is_as_it_is_now(cast: Any, autojump_clock: MockClock) -> None:
    go = trio.Event()

    async def counter(*, task_status: trio.TaskStatus[None]) -> None:
        count = 0
        publish_state(lambda: {"count": count})
        task_status.started()
        await go.wait()
        count += 1
        await trio.sleep_forever()

    run: ChildFunction = counter
    async with open_supervisor("root", [ChildSpec("counter", run), cast.spec("silent")]) as supervisor:
        assert supervisor.get_state("counter") == {"count": 0}
        go.set()
        await wait_all_tasks_blocked()
        assert supervisor.get_state("counter") == {"count": 1}
        with pytest.raises(NoState, match="child 'silent' has published no state"):
            supervisor.get_state("silent")
        await supervisor.terminate_child("counter")
        with pytest.raises(NoState):
            supervisor.get_state("counter")
        with pytest.raises(ChildNotFound):
            supervisor.get_state("nobody")


async def test_only_children_publish_a_state() -> None:
    with pytest.raises(RuntimeError, match="within a supervised child"):
        publish_state(dict)


# --- monitors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "kind"),
    [("end", "normal"), ("shutdown", "shutdown"), ("crash", "abnormal"), ("terminate", "shutdown")],
)
async def test_a_monitor_is_told_of_the_end(
    cast: Any, autojump_clock: MockClock, nursery: trio.Nursery, how: str, kind: str
) -> None:
    ends: list[ChildEnd] = []

    async def watch() -> None:
        ends.append(await supervisor.monitor("a"))

    async with open_supervisor("root", [cast.spec("a")]) as supervisor:
        nursery.start_soon(watch)
        nursery.start_soon(watch)
        await wait_all_tasks_blocked()
        assert ends == []
        await (supervisor.terminate_child("a") if how == "terminate" else getattr(cast, how)("a"))
        await wait_all_tasks_blocked()
        assert [(end.child_id, end.kind) for end in ends] == [("a", ExitKind(kind))] * 2
        assert (ends[0].error is not None) is (how == "crash")


async def test_who_does_not_run_cannot_be_monitored(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", [cast.spec("a")]) as supervisor:
        await supervisor.terminate_child("a")
        with pytest.raises(ChildConflict, match="is stopped"):
            await supervisor.monitor("a")
        with pytest.raises(ChildNotFound):
            await supervisor.monitor("b")


# --- number ------------------------------------------------------------------------------------------------


async def test_no_more_children_than_allowed(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor("root", strategy=Strategy.DYNAMIC, max_children=2) as supervisor:
        for _ in range(2):
            await supervisor.start_child(cast.spec("a"))
        with pytest.raises(TooManyChildren, match="supervisor 'root' already has 2 children, its max_child"):
            await supervisor.start_child(cast.spec("a"))
        await supervisor.terminate_child("a#1")
        assert (await supervisor.start_child(cast.spec("a"))).child_id == "a#3"


async def test_children_that_are_kept_count(cast: Any, autojump_clock: MockClock) -> None:
    async with open_supervisor(
        "root", [supervisor_child("b", max_children=0), cast.spec("a")], max_children=2
    ) as root:
        await root.terminate_child("a")
        with pytest.raises(TooManyChildren):
            await root.start_child(cast.spec("c"))
        await root.restart_child("a")
        with pytest.raises(TooManyChildren, match="already has 0 children"):
            await root.which_children()[0].value.start_child(cast.spec("d"))


async def test_more_children_to_begin_with_than_allowed(cast: Any, autojump_clock: MockClock) -> None:
    with pytest.raises(InvalidSpec, match="begins with 2 children, but max_children is 1"):
        async with open_supervisor("root", [cast.spec("a"), cast.spec("b")], max_children=1):
            pytest.fail("the body must not run")
    with pytest.raises(InvalidSpec, match="max_children must be at least 0, got -1"):
        supervisor_child("a", max_children=-1)
