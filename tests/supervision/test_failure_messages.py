"""A log line and an error say who and why, in their text."""

from __future__ import annotations

import io
import logging
import signal
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.logs import KeyValueFormatter
from ullm.supervision import (
    BRUTAL_KILL,
    ChildSpec,
    RestartLimitReached,
    StartFailed,
    open_supervisor,
    signal_ladder,
    supervisor_child,
)


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What `logging.basicConfig()` shows."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    logger = logging.getLogger("ullm.supervision")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


async def test_a_failure_says_who_and_why_and_shows_where(
    cast: Any, autojump_clock: MockClock, lines: io.StringIO
) -> None:
    async with open_supervisor("root", [cast.spec("a")]):
        await cast.crash("a", "no disk\nsecond line")
    first, *others = lines.getvalue().splitlines()
    assert first == "WARNING:ullm.supervision:child failed  supervisor=root child=a cause=Boom: no disk"
    assert others[0] == "Traceback (most recent call last):"
    assert any("in _play" in line for line in others)


async def test_an_end_that_is_no_exception_has_no_traceback(
    cast: Any, autojump_clock: MockClock, lines: io.StringIO
) -> None:
    async with open_supervisor("root", [cast.spec("a")]):
        await cast.end("a")
    assert lines.getvalue() == (
        "WARNING:ullm.supervision:child failed  supervisor=root child=a cause=ActorLost: ended\n"
    )


async def test_giving_up_names_each_supervisor(
    cast: Any, autojump_clock: MockClock, lines: io.StringIO
) -> None:
    inner = supervisor_child("inner", [cast.spec("a")], intensity=0)

    async def live() -> None:
        async with open_supervisor("root", [inner], intensity=0):
            await cast.crash("a", "no disk")
            await trio.sleep_forever()

    with pytest.raises(RestartLimitReached):
        await live()
    events = [line.split(":", 2)[2] for line in lines.getvalue().splitlines() if line.startswith("WARN")]
    assert [event.split(" cause=")[0] for event in events] == [
        "child failed  supervisor=inner child=a",
        "supervisor gave up  supervisor=inner",
        "child failed  supervisor=root child=inner",
        "supervisor gave up  supervisor=root",
    ]
    assert all("no disk" in event for event in events)


async def test_a_kill_hook_that_fails(cast: Any, autojump_clock: MockClock, lines: io.StringIO) -> None:
    def kill() -> None:
        raise OSError("no such process")

    release = trio.Event()
    async with open_supervisor("root", [cast.stubborn("a", release, kill=kill, shutdown=BRUTAL_KILL)]):
        pass
    release.set()
    cause = "cause=OSError: no such process"
    assert f"ERROR:ullm.supervision:kill hook failed  supervisor=root child=a {cause}\n" in lines.getvalue()


async def test_a_signal_is_named_with_what_is_done(lines: io.StringIO) -> None:
    heard: list[signal.Signals] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(signal_ladder, heard.append, heard.append)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert lines.getvalue().splitlines() == [
        "INFO:ullm.supervision:signal received  signal=SIGTERM count=1 action=drain",
        "INFO:ullm.supervision:signal received  signal=SIGINT count=2 action=hurry",
    ]


@pytest.mark.parametrize(("level", "shown"), [("INFO", False), ("DEBUG", True)])
async def test_ullm_s_own_handler_shows_the_traceback_at_debug_only(
    cast: Any, autojump_clock: MockClock, lines: io.StringIO, level: str, shown: bool
) -> None:
    logger = logging.getLogger("ullm")
    before = logger.level
    logging.getLogger("ullm.supervision").handlers[-1].setFormatter(KeyValueFormatter())
    logger.setLevel(level)
    try:
        async with open_supervisor("root", [cast.spec("a")]):
            await cast.crash("a", "no disk")
    finally:
        logger.setLevel(before)
    assert "child failed  supervisor=root child=a cause=Boom: no disk" in lines.getvalue()
    assert ("Traceback" in lines.getvalue()) is shown


@pytest.mark.parametrize(
    ("cause", "named"),
    [
        (AssertionError(), "AssertionError"),
        (OSError("no disk"), "no disk"),
        (ExceptionGroup("one", [TimeoutError()]), "TimeoutError"),
    ],
    ids=["silent", "with a text", "in a group"],
)
def test_errors_name_causes_without_a_text(cause: Exception, named: str) -> None:
    assert str(StartFailed("a", cause)) == f"child 'a' failed to start: {named}"
    assert str(RestartLimitReached("root", 1, 5, cause, "a")).endswith(f"last cause: child 'a': {named}")
    assert str(RestartLimitReached("root", 1, 5, cause)).endswith(f"last cause: {named}")


async def test_a_silent_assertion_can_be_found_from_the_message_alone(autojump_clock: MockClock) -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        raise AssertionError

    with pytest.raises(StartFailed, match="child 'a' failed to start: AssertionError") as caught:
        async with open_supervisor("root", [ChildSpec("a", run)]):
            pytest.fail("the body must not run")
    assert "in run" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("error", "line", "text"),
    [
        (
            ExceptionGroup("", [ValueError("a"), KeyError("b")]),
            "ExceptionGroup: ValueError: a; KeyError: 'b'",
            "ExceptionGroup: ValueError: a; KeyError: 'b'",
        ),
        (
            ExceptionGroup("Exceptions from Trio nursery", [OSError(str(number)) for number in range(5)]),
            "ExceptionGroup: OSError: 0; OSError: 1; OSError: 2; and 2 more",
            "ExceptionGroup: OSError: 0; OSError: 1; OSError: 2; and 2 more",
        ),
        (ExceptionGroup("", [OSError("no disk")]), "OSError: no disk", "no disk"),
        (KeyError("port"), "KeyError: 'port'", "KeyError: 'port'"),
        (OSError("\nno disk\n"), "OSError: no disk", "no disk"),
        (OSError(), "OSError", "OSError"),
    ],
    ids=["two", "many", "one", "a key", "an empty line", "no text"],
)
async def test_causes_that_say_little_by_themselves(
    lines: io.StringIO, error: Exception, line: str, text: str
) -> None:
    async def bad(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        raise error

    with pytest.raises(RestartLimitReached) as caught:
        async with open_supervisor("root", [ChildSpec("a", bad)], intensity=0):
            await trio.sleep_forever()
    assert str(caught.value).endswith(f"; last cause: child 'a': {text}")
    first = lines.getvalue().splitlines()[0]
    assert first == f"WARNING:ullm.supervision:child failed  supervisor=root child=a cause={line}"
