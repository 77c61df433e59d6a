"""Supervisors that stop by themselves when significant children have ended (OTP's auto_shutdown)."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import AutoShutdown, ChildSpec, Restart, Strategy, open_supervisor, supervisor_child


def significant(cast: Any, child_id: str, restart: Restart = Restart.TRANSIENT) -> ChildSpec:
    return cast.spec(child_id, restart=restart, significant=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("restart", "how"),
    [
        (Restart.TRANSIENT, "end"),
        (Restart.TRANSIENT, "shutdown"),
        (Restart.TEMPORARY, "end"),
        (Restart.TEMPORARY, "shutdown"),
        (Restart.TEMPORARY, "crash"),
    ],
)
async def test_any_significant(cast: Any, autojump_clock: MockClock, restart: Restart, how: str) -> None:
    specs = [cast.spec("a"), significant(cast, "b", restart), significant(cast, "c", restart)]
    async with open_supervisor("root", specs, auto_shutdown=AutoShutdown.ANY_SIGNIFICANT) as supervisor:
        await getattr(cast, how)("b")
        await trio.sleep_forever()
    assert supervisor.auto_stopped
    assert cast.log[-3:] == ["stop b", "stop c", "stop a"]


async def test_all_significant(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.spec("a"), significant(cast, "b"), significant(cast, "c")]
    async with open_supervisor("root", specs, auto_shutdown=AutoShutdown.ALL_SIGNIFICANT) as supervisor:
        await cast.end("b")
        assert not supervisor.stopping
        await cast.end("c")
        await trio.sleep_forever()
    assert supervisor.auto_stopped


async def test_a_significant_child_that_is_restarted_does_not_stop_it(
    cast: Any, autojump_clock: MockClock
) -> None:
    specs = [significant(cast, "a")]
    async with open_supervisor("root", specs, auto_shutdown=AutoShutdown.ANY_SIGNIFICANT) as supervisor:
        await cast.crash("a")
        assert not supervisor.stopping
        assert supervisor.which_children()[0].restarts == 1


async def test_a_restarting_sibling_counts_as_active(cast: Any, autojump_clock: MockClock) -> None:
    specs = [significant(cast, "a"), significant(cast, "b")]
    options: Any = {"auto_shutdown": AutoShutdown.ALL_SIGNIFICANT, "restart_delay": lambda _: 1.0}
    async with open_supervisor("root", specs, **options) as supervisor:
        await cast.crash("a")
        await cast.end("b")
        assert not supervisor.stopping
        await trio.sleep(1.5)
        await cast.end("a")
        await trio.sleep_forever()


async def test_an_insignificant_child_does_not_stop_it(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.spec("a", restart=Restart.TRANSIENT), significant(cast, "b")]
    async with open_supervisor("root", specs, auto_shutdown=AutoShutdown.ANY_SIGNIFICANT) as supervisor:
        await cast.end("a")
        assert not supervisor.stopping


@pytest.mark.parametrize("mode", [AutoShutdown.ANY_SIGNIFICANT, AutoShutdown.ALL_SIGNIFICANT])
async def test_termination_by_hand_does_not_stop_it(
    cast: Any, autojump_clock: MockClock, mode: AutoShutdown
) -> None:
    async with open_supervisor("root", [significant(cast, "a")], auto_shutdown=mode) as supervisor:
        await supervisor.terminate_child("a")
        await wait_all_tasks_blocked()
        assert not supervisor.stopping


async def test_being_stopped_for_a_sibling_does_not_stop_it(cast: Any, autojump_clock: MockClock) -> None:
    specs = [cast.spec("a"), significant(cast, "b", Restart.TEMPORARY)]
    options: Any = {"strategy": Strategy.ONE_FOR_ALL, "auto_shutdown": AutoShutdown.ANY_SIGNIFICANT}
    async with open_supervisor("root", specs, **options) as supervisor:
        await cast.crash("a")
        assert not supervisor.stopping
        assert [child.child_id for child in supervisor.which_children()] == ["a"]


async def test_a_nested_supervisor_that_stops_by_itself_ends_normally(
    cast: Any, autojump_clock: MockClock
) -> None:
    nested = supervisor_child(
        "nested",
        [significant(cast, "a")],
        auto_shutdown=AutoShutdown.ANY_SIGNIFICANT,
        restart=Restart.TRANSIENT,
        significant=True,
    )
    async with open_supervisor(
        "root", [cast.spec("b"), nested], auto_shutdown=AutoShutdown.ALL_SIGNIFICANT, intensity=0
    ) as supervisor:
        await cast.end("a")
        await trio.sleep_forever()
    assert supervisor.auto_stopped
    assert cast.log == ["start b", "start a", "stop a", "stop b"]


async def test_a_permanent_nested_supervisor_that_stops_by_itself_is_restarted(
    cast: Any, autojump_clock: MockClock
) -> None:
    nested = supervisor_child("nested", [significant(cast, "a")], auto_shutdown=AutoShutdown.ANY_SIGNIFICANT)
    async with open_supervisor("root", [nested]) as supervisor:
        await cast.end("a")
        (child,) = supervisor.which_children()
        assert child.restarts == 1
        assert [grandchild.value for grandchild in child.children] == [2]
