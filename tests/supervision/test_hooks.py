"""What a supervisor calls back: a failure, a restart, the end of its patience."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import (
    InvalidSpec,
    Restart,
    RestartLimitReached,
    StartFailed,
    Strategy,
    open_supervisor,
    supervisor_child,
)


class Heard:
    """Hooks that keep what they hear."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, BaseException]] = []

    def hooks(self, where: str = "") -> dict[str, Any]:
        def keep(name: str) -> Any:
            return lambda child_id, error: self.calls.append((where + name, child_id, error))

        return {f"on_{name}": keep(name) for name in ("failure", "restart", "give_up")}

    def brief(self) -> list[tuple[str, str, str]]:
        return [(name, child_id, type(error).__name__) for name, child_id, error in self.calls]


async def test_hooks_get_the_child_and_the_exception(cast: Any, autojump_clock: MockClock) -> None:
    heard = Heard()

    async def live() -> None:
        async with open_supervisor("root", [cast.spec("a"), cast.spec("b")], **heard.hooks()):
            await cast.crash("a", "first")
            assert heard.brief() == [("failure", "a", "Boom"), ("restart", "a", "Boom")]
            assert heard.calls[0][2] is heard.calls[1][2]
            await cast.crash("b", "second")
            await trio.sleep_forever()

    with pytest.raises(RestartLimitReached) as caught:
        await live()
    assert heard.brief()[2:] == [("failure", "b", "Boom"), ("give_up", "b", "RestartLimitReached")]
    assert heard.calls[-1][2] is caught.value
    assert caught.value.cause is heard.calls[2][2]


async def test_a_sibling_hears_whose_failure_it_was(cast: Any, autojump_clock: MockClock) -> None:
    heard, specs = Heard(), [cast.spec("a"), cast.spec("b")]
    async with open_supervisor("root", specs, strategy=Strategy.ONE_FOR_ALL, **heard.hooks()):
        await cast.crash("b", "the cause")
    assert [(name, child_id, str(error)) for name, child_id, error in heard.calls] == [
        ("failure", "b", "the cause"),
        ("restart", "a", "the cause"),
        ("restart", "b", "the cause"),
    ]


async def test_a_restart_that_fails_is_a_failure_and_no_restart(cast: Any, autojump_clock: MockClock) -> None:
    heard = Heard()
    async with open_supervisor("root", [cast.spec("a")], intensity=9, **heard.hooks()):
        cast.opening("a", "fail", "slow")
        await cast.crash("a")
        assert [(name, str(error)) for name, _, error in heard.calls] == [
            ("failure", "boom"),
            ("failure", "a cannot start"),
        ]
        await trio.sleep(2)
        assert heard.calls[2][0] == "restart"
        assert str(heard.calls[2][2]) == "a cannot start"


async def test_calls_by_hand_are_no_restarts(cast: Any, autojump_clock: MockClock) -> None:
    heard = Heard()
    async with open_supervisor("root", [cast.spec("a")], **heard.hooks()) as supervisor:
        await supervisor.terminate_child("a")
        await supervisor.restart_child("a")
        cast.opening("b", "fail")
        with pytest.raises(StartFailed):
            await supervisor.start_child(cast.spec("b"))
    assert heard.calls == []


async def test_a_child_that_is_terminated_while_it_restarts(cast: Any, autojump_clock: MockClock) -> None:
    heard = Heard()
    async with open_supervisor("root", [cast.spec("a")], **heard.hooks()) as supervisor:
        cast.opening("a", "hang")
        await cast.crash("a")
        await supervisor.terminate_child("a")
        await supervisor.restart_child("a")
    assert heard.brief() == [("failure", "a", "Boom")]


async def test_a_temporary_child_that_fails_is_heard_of(cast: Any, autojump_clock: MockClock) -> None:
    heard = Heard()
    async with open_supervisor("root", [cast.spec("a", restart=Restart.TEMPORARY)], **heard.hooks()):
        await cast.crash("a")
    assert heard.brief() == [("failure", "a", "Boom")]


async def test_nested_supervisors_have_hooks_of_their_own(cast: Any, autojump_clock: MockClock) -> None:
    heard = Heard()
    inner = supervisor_child("inner", [cast.spec("a")], intensity=0, **heard.hooks("inner "))
    async with open_supervisor("root", [inner], **heard.hooks("outer ")):
        await cast.crash("a")
        await wait_all_tasks_blocked()
    assert heard.brief() == [
        ("inner failure", "a", "Boom"),
        ("inner give_up", "a", "RestartLimitReached"),
        ("outer failure", "inner", "RestartLimitReached"),
        ("outer restart", "inner", "RestartLimitReached"),
    ]


async def test_a_hook_that_fails_is_logged_and_costs_nothing_else(
    cast: Any, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(child_id: str, error: BaseException) -> None:
        raise OSError("no pager")

    async def live() -> None:
        hooks: dict[str, Any] = {"on_failure": fail, "on_restart": fail, "on_give_up": fail}
        async with open_supervisor("root", [cast.spec("a")], **hooks) as supervisor:
            await cast.crash("a")
            assert [child.status.value for child in supervisor.which_children()] == ["running"]
            await cast.crash("a", "again")
            await trio.sleep_forever()

    with pytest.raises(RestartLimitReached, match="again"):
        await live()
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    names = ("on_failure", "on_restart", "on_failure", "on_give_up")
    assert errors == [f"{name} failed  supervisor=root child=a cause=OSError: no pager" for name in names]


@pytest.mark.parametrize("name", ["on_abandoned", "on_failure", "on_restart", "on_give_up"])
async def test_an_async_hook_is_refused(name: str) -> None:
    async def hook(*args: object) -> None:
        raise AssertionError("it would never be awaited")

    options: dict[str, Any] = {name: hook}
    with pytest.raises(InvalidSpec, match=f"{name} must be a function that is not async"):
        supervisor_child("a", **options)
