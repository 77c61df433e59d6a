"""Programs with an engine inside: signals, cancellation, lost workers and sleep, seen from outside."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.server import Serve, Server, is_gone, starting_servers
from tests.support.waiting import eventually

pytestmark = pytest.mark.process

HOSTS = Path(__file__).parent / "hosts.py"
KINDS = ["engine", "llm-asyncio", "llm-trio"]
SOME_KINDS = ["llm-asyncio", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("engine", "llm-trio"))]
ENDLESS = 3000


@pytest.fixture
def run(serve: Serve, scripted_model: Path) -> Callable[..., Server]:
    def start(kind: str, transport: str = "process", tokens: int = 150) -> Server:
        command = [sys.executable, str(HOSTS), kind, str(scripted_model), transport, str(tokens)]
        return serve(command=command, ready="^(begun)", environ={"PYTHONHASHSEED": "0"})

    return start


def ends(program: Server) -> dict[int, list[str]]:
    """Of each request: finish reason, tokens, and a number that stands for them."""
    found = re.findall(r"(?m)^end (\d) (\w+) (\d+) (\S+)$", program.output)
    return {int(number): rest for number, *rest in found}


def reasons(program: Server) -> list[str]:
    return [reason for reason, *_ in ends(program).values()]


@pytest.fixture(scope="session")
def undisturbed(scripted_model: Path) -> dict[int, list[str]]:
    """What the requests say where nothing goes wrong."""
    command = [sys.executable, str(HOSTS), "engine", str(scripted_model), "process", "150"]
    with starting_servers() as start:
        program = start(command=command, ready="^(begun)", environ={"PYTHONHASHSEED": "0"})
        assert program.wait() == 0
        return ends(program)


@pytest.mark.parametrize("transport", ["process", pytest.param("thread", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_drains(
    run: Callable[..., Server], undisturbed: dict[int, list[str]], kind: str, transport: str
) -> None:
    program = run(kind, transport)
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert ends(program) == undisturbed
    assert "4 drained, 0 aborted, 0 killed, 0 abandoned" in program.output


@pytest.mark.parametrize("transport", ["process", pytest.param("thread", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["llm-asyncio", "llm-trio"])
def test_a_stop_without_a_drain_ends_streams_with_what_they_have(
    run: Callable[..., Server], kind: str, transport: str
) -> None:
    program = run(kind, transport, ENDLESS)
    program.signal(signal.SIGINT)
    assert program.wait() == 0
    assert reasons(program) == ["abort"] * 4
    assert all(int(tokens) > 0 for _, tokens, _ in ends(program).values())
    assert "0 drained, 4 aborted" in program.output


@pytest.mark.parametrize("transport", ["process", pytest.param("thread", marks=pytest.mark.slow)])
def test_cancelling_the_scope_around_an_engine_is_an_orderly_stop(
    run: Callable[..., Server], undisturbed: dict[int, list[str]], transport: str
) -> None:
    program = run("engine", transport)
    program.signal(signal.SIGINT)
    assert program.wait() == 0
    assert ends(program) == undisturbed
    assert "state stopped" in program.output
    assert "by cancelled: 4 drained, 0 aborted, 0 killed" in program.output


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_a_lost_worker_costs_a_pause(
    run: Callable[..., Server], undisturbed: dict[int, list[str]], kind: str
) -> None:
    program = run(kind)
    worker = next(p for p in program.workers() if "--standby" not in p.cmdline())
    worker.kill()
    assert program.wait() == 0
    assert ends(program) == undisturbed
    assert "was killed by SIGKILL" in program.errors()


@pytest.mark.parametrize("transport", ["process", pytest.param("thread", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_it_sleeps_and_wakes(
    run: Callable[..., Server], undisturbed: dict[int, list[str]], kind: str, transport: str
) -> None:
    program = run(kind, transport)
    program.signal(signal.SIGUSR1)
    assert program.wait() == 0
    assert "slept asleep\nwoken awake" in program.output
    assert ends(program) == undisturbed


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_a_killed_program_leaves_no_worker(run: Callable[..., Server], kind: str) -> None:
    program = run(kind, tokens=ENDLESS)
    workers = program.workers()
    program.process.kill()
    program.process.wait()
    eventually(lambda: all(map(is_gone, workers)), seconds=1)
