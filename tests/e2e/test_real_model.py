"""The real model in a real server: memory seen from outside, and the same words after everything."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import servers_looked_after
from harness import Server, Stream, eventually, is_gone, texts

pytestmark = [pytest.mark.process, pytest.mark.e2e]

Serve = Callable[..., Server]
PROMPTS = [[504, 3575, 282, 4649 + number] for number in range(4)]
TOKENS = 24
WEIGHTS = 134_515_008 * 2
"""Bytes in bfloat16."""
PROMISED = 0.8
"""Part of the weights that must be given back."""


@pytest.fixture(scope="module")
def server(real_model: Path) -> Iterator[Server]:
    with servers_looked_after() as start:
        yield start("--dtype", "bfloat16", "--standby-workers", "0")


def ask(server: Server) -> list[Stream]:
    return [Stream(server, TOKENS, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[str]:
    return texts(ask(server))


def resident(server: Server) -> int:
    """Bytes, of all worker processes."""
    return sum(worker.memory_info().rss for worker in server.workers())


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is counted as on Linux")
@pytest.mark.parametrize("level", [2, 3])
def test_memory_is_given_back_and_comes_back(server: Server, undisturbed: list[str], level: int) -> None:
    """Level 1 keeps the weights in host memory, which for a CPU is where they are."""
    awake = resident(server)
    assert server.admin("POST", "/sleep", {"level": level}).json()["level"] == level
    assert awake - resident(server) >= PROMISED * WEIGHTS
    assert server.metric("ullm_bytes_given_back") >= PROMISED * WEIGHTS
    assert texts(ask(server)) == undisturbed
    assert abs(resident(server) - awake) <= (1 - PROMISED) * WEIGHTS


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_requests_kept_through_a_sleep_end_as_they_would_have(
    server: Server, undisturbed: list[str], level: int
) -> None:
    running = ask(server)
    for stream in running:
        assert stream.begun.wait(30)
    server.admin("POST", "/sleep", {"level": level, "mode": "keep"})
    server.admin("POST", "/wake")
    assert texts(running) == undisturbed


def test_a_reload_in_the_middle(server: Server, undisturbed: list[str]) -> None:
    running = ask(server)
    for stream in running:
        assert stream.begun.wait(30)
    first = server.worker()
    assert server.admin("POST", "/admin/reload").status_code == 200
    assert texts([*running, *ask(server)]) == undisturbed * 2
    eventually(lambda: is_gone(first))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker(server: Server, undisturbed: list[str], number: int) -> None:
    running = ask(server)
    for stream in running:
        assert stream.begun.wait(30)
    server.worker().send_signal(number)
    assert texts(running) == undisturbed


def test_a_stop_drains(serve: Serve, real_model: Path) -> None:
    server = serve("--standby-workers", "0")
    running = ask(server)
    for stream in running:
        assert stream.begun.wait(30)
    server.signal(signal.SIGTERM)
    texts(running)
    assert server.wait() == 0
