"""A process as a child, with real processes: readiness, exit codes, signals, lines."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any

import pytest
import trio

from ullm.supervision import (
    BRUTAL_KILL,
    ChildSpec,
    InvalidSpec,
    Kind,
    ProcessFailed,
    Restart,
    RestartLimitReached,
    StartFailed,
    open_supervisor,
)

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX"),
]

SLEEP = "print('ready', flush=True); import time; time.sleep(60)"
IGNORING = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
TIDY = (
    "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit(0))); "
    + SLEEP
)


def told(program: str) -> str:
    """A program that does this when it gets SIGUSR1, so that the test has time to look at it before."""
    handler = f"def told(*_):\n    {program}\n    sys.exit(0)\n"
    return f"import signal, sys\n{handler}\nsignal.signal(signal.SIGUSR1, told)\n{SLEEP}"


def python(program: str, **options: Any) -> ChildSpec:
    options.setdefault("start_timeout", 30.0)
    return ChildSpec.process("a", [sys.executable, "-S", "-c", program], **options)


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ullm.supervision")


async def test_it_is_ready_at_its_line_and_stopped_by_a_signal(caplog: pytest.LogCaptureFixture) -> None:
    async with open_supervisor("root", [python(TIDY, ready_line="ready", shutdown=30.0)]) as supervisor:
        process = supervisor.which_children()[0].value
        assert process.returncode is None
        assert os.getpgid(process.pid) == process.pid
    assert process.returncode == 0
    assert [(report.child_id, report.outcome) for report in supervisor.reports] == [("a", "stopped")]
    assert [record.getMessage() for record in caplog.records] == [
        "child output  child=a stream=stdout line=ready",
        "child output  child=a stream=stdout line=bye",
    ]


async def test_the_signal_is_chosen(caplog: pytest.LogCaptureFixture) -> None:
    spec = python(IGNORING, ready_line="ready", shutdown=30.0, stop_signal=signal.SIGUSR1)
    async with open_supervisor("root", [spec]) as supervisor:
        process = supervisor.which_children()[0].value
    assert process.returncode == -signal.SIGUSR1
    assert supervisor.reports[0].outcome == "stopped"


@pytest.mark.parametrize("shutdown", [0.1, BRUTAL_KILL])
async def test_one_that_ignores_the_signal_is_killed(shutdown: float) -> None:
    spec = python(IGNORING, ready_line="ready", shutdown=shutdown)
    async with open_supervisor("root", [spec]) as supervisor:
        process = supervisor.which_children()[0].value
    assert process.returncode == -signal.SIGKILL
    (report,) = supervisor.reports
    assert report.outcome in ("failed", "killed")  # killed: a busy machine let the supervisor's grace pass
    assert "did not end after SIGTERM within its budget and was killed" in report.detail


async def test_a_killed_one_is_started_again() -> None:
    failures: list[BaseException] = []
    again = trio.Event()
    async with open_supervisor(
        "root",
        [python(SLEEP, ready_line="ready")],
        on_failure=lambda child_id, error: failures.append(error),
        on_restart=lambda child_id, error: again.set(),
    ) as supervisor:
        first = supervisor.which_children()[0].value
        first.send_signal(signal.SIGKILL)
        await again.wait()
        assert supervisor.which_children()[0].value.pid != first.pid
    assert [str(error) for error in failures] == ["the process of child 'a' was ended by SIGKILL"]


async def test_an_exit_code_is_a_failure_that_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def live() -> None:
        spec = python("import sys; sys.stderr.write('no disk'); sys.exit(3)")
        async with open_supervisor("root", [spec], intensity=0):
            await trio.sleep_forever()

    with pytest.raises(
        RestartLimitReached, match="the process of child 'a' ended with exit code 3"
    ) as caught:
        await live()
    assert isinstance(caught.value.cause, ProcessFailed)
    assert caught.value.cause.returncode == 3
    assert caplog.records[0].getMessage() == "child output  child=a stream=stderr line=no disk"


@pytest.mark.parametrize("code", [0, 7])
async def test_codes_that_are_a_normal_end(code: int) -> None:
    program = told(f"sys.exit({code})")
    spec = python(program, ready_line="ready", restart=Restart.TRANSIENT, exit_codes=(0, 7))
    async with open_supervisor("root", [spec], intensity=0) as supervisor:
        supervisor.which_children()[0].value.send_signal(signal.SIGUSR1)
        end = await supervisor.monitor("a")
    assert (end.kind, end.error) == ("normal", None)


async def test_one_that_ends_before_it_is_ready() -> None:
    with pytest.raises(StartFailed, match="ended with exit code 3"):
        async with open_supervisor("root", [python("raise SystemExit(3)", ready_line="ready")]):
            pytest.fail("the body must not run")


async def test_a_program_that_is_not_there() -> None:
    with pytest.raises(StartFailed, match="No such file or directory: '/nowhere/program'"):
        async with open_supervisor("root", [ChildSpec.process("a", ["/nowhere/program"])]):
            pytest.fail("the body must not run")


async def test_long_lines_are_logged_in_pieces_and_none_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    program = told("print('x' * 200_000); print('last', end='')")
    spec = python(program, ready_line="ready", restart=Restart.TEMPORARY)
    async with open_supervisor("root", [spec]) as supervisor:
        supervisor.which_children()[0].value.send_signal(signal.SIGUSR1)
        await supervisor.monitor("a")
    lines = [record.args["line"] for record in caplog.records if isinstance(record.args, dict)]
    assert "".join(lines) == "ready" + "x" * 200_000 + "last"
    assert max(map(len, lines)) < 200_000


def test_values_that_make_no_sense() -> None:
    with pytest.raises(InvalidSpec, match="command must be a list of arguments, got 'sleep 1'"):
        ChildSpec.process("a", "sleep 1")
    with pytest.raises(InvalidSpec, match="command must be a list of arguments"):
        ChildSpec.process("a", [])
    with pytest.raises(InvalidSpec, match="neither kill nor kind"):
        ChildSpec.process("a", ["true"], kind=Kind.SUPERVISOR)
