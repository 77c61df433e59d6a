"""The real model in a real server: memory seen from outside, and the same words after everything."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import Serve, Server, is_gone, starting_servers
from tests.support.streams import Stream, texts, wait_begun
from tests.support.waiting import eventually
from ullm.model.kernels.cpu.build import find_compiler

pytestmark = [pytest.mark.process, pytest.mark.e2e]

PROMPTS = [[504, 3575, 282, 4649 + number] for number in range(4)]
TOKENS = 24
WEIGHTS = 134_515_008
BYTES = {"float32": 4, "bfloat16": 2}
PROMISED = 0.8
"""Part of the weights that must be given back."""


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def dtype(request: pytest.FixtureRequest) -> str:
    dtype: str = request.param
    return dtype


@pytest.fixture(scope="module")
def server(real_server: Server, dtype: str) -> Iterator[Server]:
    """With float32 by PyTorch, with bfloat16 by the CPU's kernels, without which it depends on the batch.

    These tests leave a server as it was, so the one with float32 is that of the other tests.
    """
    if dtype == "float32":
        yield real_server
        return
    if find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    with starting_servers() as start:
        yield start("--dtype", dtype, "--cpu-kernels", "--standby-workers", "0")


def ask(server: Server) -> list[Stream]:
    return [Stream(server, TOKENS, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[str]:
    return texts(ask(server))


def resident(server: Server) -> int:
    """Bytes, of all worker processes."""
    return sum(worker.memory_info().rss for worker in server.workers())


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is counted as on Linux")
@pytest.mark.parametrize("level", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_memory_is_given_back_and_comes_back(
    server: Server, undisturbed: list[str], dtype: str, level: int
) -> None:
    """Level 1 keeps the weights in host memory, which for a CPU is where they are."""
    weights = WEIGHTS * BYTES[dtype]
    awake = resident(server)
    assert server.admin("POST", "/sleep", {"level": level}).json()["level"] == level
    assert awake - resident(server) >= PROMISED * weights
    assert server.metric("ullm_bytes_given_back") >= PROMISED * weights
    assert texts(ask(server)) == undisturbed
    assert abs(resident(server) - awake) <= (1 - PROMISED) * weights


@pytest.mark.parametrize("level", [1, *(pytest.param(level, marks=pytest.mark.slow) for level in (0, 2, 3))])
def test_requests_kept_through_a_sleep_end_as_they_would_have(
    server: Server, undisturbed: list[str], level: int
) -> None:
    running = wait_begun(ask(server))
    server.admin("POST", "/sleep", {"level": level, "mode": "keep"})
    server.admin("POST", "/wake")
    assert texts(running) == undisturbed


@pytest.mark.slow
def test_a_reload_in_the_middle(server: Server, undisturbed: list[str]) -> None:
    running = wait_begun(ask(server))
    first = server.worker()
    assert server.admin("POST", "/admin/reload").status_code == 200
    assert texts([*running, *ask(server)]) == undisturbed * 2
    eventually(lambda: is_gone(first))


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_lost_worker(server: Server, undisturbed: list[str], number: int) -> None:
    running = wait_begun(ask(server))
    server.worker().send_signal(number)
    assert texts(running) == undisturbed


@pytest.mark.slow
def test_a_stop_drains(serve: Serve, real_model: Path) -> None:
    server = serve("--standby-workers", "0")
    running = wait_begun(ask(server))
    server.signal(signal.SIGTERM)
    texts(running)
    assert server.wait() == 0
