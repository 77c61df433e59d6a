"""Prefill and decode on replicas of their own, in processes: texts, losses amid a hand-over, leftovers."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.server import SCRIPTED, Serve, Server
from tests.support.streams import Stream, texts, wait_begun
from tests.support.waiting import eventually

pytestmark = pytest.mark.process

TOKENS = 100
COUNT = 4
APART = ("--replicas", "2", "--roles", "prefill,decode", "--prefill-threshold", "100", "--max-restarts", "9")
CHUNK = 'ullm_kv_handovers_total{outcome="%s"}'


def long_streams(server: Server, tokens: int = TOKENS) -> list[Stream]:
    """Requests whose prompts are long."""
    prompts = [[300 + number, *(310 + place % 90 for place in range(300))] for number in range(COUNT)]
    return [Stream(server, tokens, prompt) for prompt in prompts]


def segments() -> list[str]:
    """Names of shared memory that is ullm's."""
    return [name for name in os.listdir("/dev/shm") if "ullm" in name] if sys.platform == "linux" else []


def fired(server: Server) -> int:
    """Faults that have happened."""
    return len(server.admin("GET", "/admin/faults").json()["fired"])


@pytest.mark.parametrize("transport", ["process", pytest.param("thread", marks=pytest.mark.slow)])
def test_each_request_moves_and_says_the_same(
    serve: Serve, scripted_model: Path, scripted_server: Server, transport: str
) -> None:
    undisturbed = texts(long_streams(scripted_server))
    options = ("--runner", "ullm.testing:ScriptedRunner", "--transport", transport)
    server = serve("--model", str(scripted_model), *options, *APART)
    assert [replica["role"] for replica in server.replicas()] == ["prefill", "decode"]
    assert texts(long_streams(server)) == undisturbed
    assert server.metric(CHUNK % "moved") == COUNT
    assert server.metric("ullm_kv_handover_blocks_total") >= 301 // 16
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.slow
def test_kv_that_is_corrupt_on_its_way_is_not_used(
    serve: Serve, scripted_model: Path, scripted_server: Server
) -> None:
    undisturbed = texts(long_streams(scripted_server))
    server = serve("--model", str(scripted_model), *SCRIPTED, *APART, "--faults", "handover.chunk:corrupt")
    assert texts(long_streams(server)) == undisturbed
    assert (server.metric(CHUNK % "refused"), server.metric(CHUNK % "moved")) == (1, COUNT - 1)


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["prefill", "decode"])
def test_either_side_is_killed_amid_hand_overs(
    serve: Serve, scripted_model: Path, scripted_server: Server, lost: int
) -> None:
    """A fault holds hand-overs open, and the loss ends them. Nothing of their memory is left, even if the
    engine itself is killed amid one."""
    undisturbed = texts(long_streams(scripted_server))
    faults = ("--faults", "handover.chunk:delay@seconds=9,times=3")
    server = serve("--model", str(scripted_model), *SCRIPTED, *APART, *faults)
    running = wait_begun(long_streams(server))
    eventually(lambda: fired(server) == 2)
    assert segments() == []
    server.worker(lost).kill()
    assert texts(running) == undisturbed
    assert server.metric(CHUNK % "lost") >= 2
    eventually(lambda: all(replica["up"] for replica in server.replicas()))
    Stream(server, 1000, [390, *range(310, 390), *range(310, 390)])
    eventually(lambda: fired(server) == 3)
    server.signal(signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    assert segments() == []


@pytest.mark.slow
def test_a_real_model_says_the_same_and_survives_the_loss_of_its_prefill(serve: Serve) -> None:
    options = ("--dtype", "float32", "--cpu-threads", "1", "--num-blocks", "256")
    prompts = [[1000 + 17 * number + place for place in range(300)] for number in range(2)]
    server = serve(*options, *APART)
    alone = [text for prompt in prompts for text in texts([Stream(server, 24, prompt, cache_salt="alone")])]
    assert server.metric(CHUNK % "moved") == 2
    assert server.metric("ullm_kv_handover_bytes_total") >= 2 * 288 * 30 * 2 * 3 * 64 * 4
    both = wait_begun([Stream(server, 24, prompt) for prompt in prompts])
    server.worker(0).kill()
    assert texts(both) == alone
