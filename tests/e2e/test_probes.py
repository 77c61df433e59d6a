"""What the probes say of a real server in each of its states, and that it is true."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import SCRIPTED, Serve, Server
from tests.support.streams import streams, texts
from tests.support.waiting import eventually

pytestmark = pytest.mark.process


def replica(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.replicas()[0]
    return found


def probes(server: Server) -> dict[str, int]:
    return {path: server.get(path).status_code for path in ("/live", "/ready", "/health")}


GOOD = {"/live": 200, "/ready": 200, "/health": 200}
NOT_READY = {"/live": 200, "/ready": 503, "/health": 503}


@pytest.mark.timing
def test_an_idle_server_asks_its_workers_by_itself(
    serve: Serve, scripted_model: Path, transport: tuple[str, str]
) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, *transport, "--health-interval", "0.2")
    eventually(lambda: replica(server)["round_trip_age"] is not None)
    ages = [replica(server)["round_trip_age"] for _ in range(50)]
    assert max(ages) < 2
    eventually(lambda: replica(server)["round_trip_age"] < 0.1)
    assert probes(server) == GOOD


@pytest.mark.timing
def test_a_busy_server_has_fresh_round_trips(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--health-interval", "100")
    running = streams(server, 4, 200)
    assert replica(server)["round_trip_age"] < 0.5
    texts(running)


def test_an_idle_worker_that_is_suspended_is_found(serve: Serve, scripted_model: Path) -> None:
    """Nobody has asked for anything: the canary does not come back."""
    options = ("--health-interval", "0.2", "--step-timeout", "1")
    server = serve("--model", str(scripted_model), *SCRIPTED, *options)
    worker = server.worker()
    os.kill(worker.pid, signal.SIGSTOP)
    eventually(lambda: replica(server)["epoch"] == 2 and replica(server)["up"])
    assert probes(server) == GOOD
    texts(streams(server, 2, 20))


def test_no_replica_left_is_not_ready(serve: Serve, scripted_model: Path) -> None:
    load = {"ULLM_SCRIPTED_LOAD_SECONDS": "1"}
    server = serve("--model", str(scripted_model), *SCRIPTED, "--standby-workers", "0", environ=load)
    assert probes(server) == GOOD
    server.worker().kill()
    server.wait_state("restarting")
    assert probes(server) == NOT_READY
    assert replica(server)["state"] == "restarting"
    server.wait_state("running")
    assert probes(server) == GOOD


def test_states_are_told_apart(serve: Serve, scripted_model: Path) -> None:
    load = {"ULLM_SCRIPTED_LOAD_SECONDS": "0.5"}
    server = serve("--model", str(scripted_model), *SCRIPTED, environ=load, wait=False)
    server.find_url()
    seen = [server.state()]
    server.wait_ready()
    seen.append(server.state())
    server.admin("POST", "/sleep", {"level": 1})
    seen.append(server.state())
    server.admin("POST", "/wake")
    (stream,) = streams(server, 1, 100)
    server.signal(signal.SIGTERM)
    server.wait_state("draining")
    seen.append("draining")
    assert probes(server) == NOT_READY
    texts([stream])
    assert seen == ["starting", "running", "sleeping", "draining"]
    assert server.wait() == 0
