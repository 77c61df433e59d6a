"""Several replicas: what happens to one is not seen from outside."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

from tests.support.server import SCRIPTED, Serve, Server
from tests.support.streams import Stream, streams, texts
from tests.support.waiting import eventually

pytestmark = pytest.mark.process

TOKENS = 200


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_the_other_replica_takes_over(serve: Serve, scripted_model: Path, number: int) -> None:
    slow_start = {"ULLM_SCRIPTED_LOAD_SECONDS": "1"}
    options = ("--replicas", "2", "--step-timeout", "1", "--standby-workers", "0")
    server = serve("--model", str(scripted_model), *SCRIPTED, *options, environ=slow_start)
    undisturbed = texts(streams(server, 8, TOKENS))
    running = streams(server, 8, TOKENS)
    server.worker(0).send_signal(number)
    eventually(lambda: not server.replicas()[0]["up"])
    assert server.get("/ready").status_code == 200
    assert server.state() == "running"
    assert texts(running) == undisturbed
    assert server.replicas()[1]["epoch"] == 1
    eventually(lambda: server.replicas()[0]["up"])


def test_the_engine_lives_as_long_as_one_replica(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--replicas", "2", "--max-restarts", "0")
    undisturbed = texts(streams(server, 6, TOKENS))
    running = streams(server, 6, TOKENS)
    server.worker(0).kill()
    assert texts(running) == undisturbed
    eventually(lambda: server.replicas()[0]["state"] == "failed")
    assert server.get("/ready").status_code == 200
    (stream,) = streams(server, 1, 3000)
    server.worker(1).kill()
    assert stream.join().failure is not None
    assert server.wait() == 70


@pytest.mark.slow
def test_all_replicas_lost_at_once(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--replicas", "3")
    undisturbed = texts(streams(server, 9, TOKENS))
    workers = [server.worker(replica) for replica in range(3)]
    running = streams(server, 9, TOKENS)
    for worker in workers:  # in one moment: who moves from one to the next and loses each of them is given up
        worker.kill()
    late = Stream(server, 20)
    assert texts(running) == undisturbed
    texts([late])


def test_a_stop_drains_all_of_them(serve: Serve, scripted_model: Path, transport: tuple[str, str]) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, *transport, "--replicas", "3")
    running = streams(server, 9, TOKENS)
    server.signal(signal.SIGTERM)
    server.wait_state("draining")
    texts(running)
    assert server.wait() == 0
    assert "9 drained, 0 aborted, 0 killed" in server.errors().splitlines()[-1]


def test_a_limit_of_migrations(serve: Serve, scripted_model: Path) -> None:
    """A stream ends with an event, an answer in one piece with a status."""
    server = serve("--model", str(scripted_model), *SCRIPTED, "--replicas", "2", "--migration-limit", "0")
    (running,) = streams(server, 1, 3000)
    whole = Stream(server, 3000, stream=False)
    eventually(lambda: server.metric("ullm_num_requests_running") == 2)
    for replica in range(2):
        server.worker(replica).kill()
    for each in (running.join(), whole.join()):
        assert each.failure is not None
        assert each.failure["code"] == "migration_limit"
    assert (running.status, whole.status) == (200, 503)
    texts([Stream(server, 20)])


def is_up(server: Server, epoch: int) -> bool:
    replica = server.replicas()[1]
    return bool(replica["up"]) and replica["epoch"] == epoch


def test_a_replica_that_keeps_dying_is_on_trial(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--replicas", "2")
    for epoch in (2, 3):
        server.worker(1).kill()
        eventually(partial(is_up, server, epoch))
    assert [replica["breaker"] for replica in server.replicas()] == ["closed", "half_open"]
    texts(streams(server, 4, TOKENS))
    eventually(lambda: server.replicas()[1]["breaker"] == "closed")
