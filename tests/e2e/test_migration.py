"""Workers lost under every kind of request, with and without restarts left."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

from tests.support.server import SCRIPTED, Serve, Server
from tests.support.streams import Stream, texts
from tests.support.waiting import SECONDS, eventually

pytestmark = pytest.mark.process

WAYS = [(chat, stream) for chat in (False, True) for stream in (False, True)]
TOKENS = 150
LONGEST_GAP = 6.0
"""Seconds; the limit that Dynamo's tests of migration have."""


def ask_all_ways(server: Server, tokens: int = TOKENS) -> list[Stream]:
    """One request of each kind, all of them under way."""
    with server.worker_held(until=len(WAYS)):
        found = [Stream(server, tokens, chat=chat, stream=stream) for chat, stream in WAYS]
    for asked, (_, stream) in zip(found, WAYS, strict=True):
        assert not stream or asked.begun.wait(SECONDS)
    return found


def has_restarted(server: Server, times: int) -> bool:
    """Workers were lost so often, and all requests run again."""
    found = [server.metric(f"ullm_{name}") for name in ("worker_restarts_total", "num_requests_running")]
    return found == [times, len(WAYS)]


@pytest.fixture(scope="session")
def undisturbed(scripted_server: Server) -> list[str]:
    """What they say where nothing goes wrong."""
    found = texts(ask_all_ways(scripted_server))
    assert found[0] == found[1]
    assert found[2] == found[3]
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_all_kinds_of_requests_go_on(
    serve: Serve, scripted_model: Path, undisturbed: list[str], number: int
) -> None:
    """A worker that gets SIGTERM from outside does not leave: only its parent's word counts."""
    server = serve("--model", str(scripted_model), *SCRIPTED, "--max-restarts", "3")
    running = ask_all_ways(server)
    server.worker().send_signal(number)
    assert texts(running) == undisturbed
    assert max(stream.gap for stream in running) < LONGEST_GAP
    assert server.metric("ullm_worker_restarts_total") == (number == signal.SIGKILL)


@pytest.mark.slow
def test_three_losses_in_a_row(serve: Serve, scripted_model: Path, undisturbed: list[str]) -> None:
    """As many as are allowed, each when all run again; the texts are the same to the last token."""
    server = serve("--model", str(scripted_model), *SCRIPTED, "--max-restarts", "3")
    running = ask_all_ways(server, 600)
    for count in (1, 2, 3):
        server.worker().kill()
        eventually(partial(has_restarted, server, count))
    found = texts(running)
    assert [text.startswith(before) for text, before in zip(found, undisturbed, strict=True)] == [True] * 4
    assert (found[0], found[2]) == (found[1], found[3])
    assert max(stream.gap for stream in running) < LONGEST_GAP


def test_without_restarts_all_kinds_of_requests_fail_with_the_cause(
    serve: Serve, scripted_model: Path
) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--max-restarts", "0")
    running = ask_all_ways(server)
    server.worker().kill()
    for asked, (_, stream) in zip(running, WAYS, strict=True):
        asked.join()
        assert asked.status == (200 if stream else 500)
        assert asked.failure is not None
        assert asked.failure["code"] == "engine_dead"
        assert "replica0.rank0 was killed by SIGKILL" in asked.failure["message"]
        assert asked.finish_reason is None
    assert server.wait() == 70


def test_without_restarts_sigterm_to_a_worker_changes_nothing(
    serve: Serve, scripted_model: Path, undisturbed: list[str]
) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--max-restarts", "0")
    running = ask_all_ways(server)
    server.worker().terminate()
    assert texts(running) == undisturbed
