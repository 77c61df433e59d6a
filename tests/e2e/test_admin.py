"""The admin endpoints of a real server, from before the model is loaded until it has stopped."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.server import SCRIPTED, Serve, Server, starting_servers
from tests.support.streams import Stream, streams, texts
from tests.support.waiting import eventually

pytestmark = pytest.mark.process

GONE_SECONDS = 2.0
"""Seconds that a stop takes at most while the server starts."""


def test_the_admin_listener_answers_while_the_model_loads(serve: Serve, scripted_model: Path) -> None:
    environ = {"ULLM_SCRIPTED_LOAD_SECONDS": "60"}
    server = serve("--model", str(scripted_model), *SCRIPTED, environ=environ, wait=False)
    eventually(lambda: server.workers())
    tree = server.admin("GET", "/admin/tree").json()
    assert tree["state"] == "starting"
    status = {child["name"]: child["status"] for child in tree["children"]}
    assert (status["http"], status["admin"]) == ("running", "running")
    assert status["replica0"] == "starting"
    assert server.admin("POST", "/sleep").json()["error"]["code"] == "not_ready"
    assert server.admin("POST", "/admin/shutdown").status_code == 200
    assert server.wait(GONE_SECONDS) == 0


def test_a_shutdown_drains(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED)
    running = streams(server, 4, 150)
    assert server.get("/admin/tree").status_code == 403
    assert server.admin("POST", "/admin/shutdown").json() == {"state": "draining", "timeout": 25.0}
    assert len(texts(running)) == 4
    assert server.wait() == 0
    assert "by admin: 4 drained" in server.errors()


def test_a_later_shutdown_makes_it_sooner(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--admin-key", "secret")
    (running,) = streams(server, 1, 3000)
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer secret"}) as admin:
        assert admin.post("/admin/shutdown").status_code == 200
        server.wait_state("draining")
        assert admin.post("/admin/shutdown", json={"timeout": 0}).status_code == 200
    assert running.join().finish_reason == "abort"
    assert server.wait(20) == 0, "sooner than the first shutdown would have ended"


@pytest.fixture(scope="module")
def server(scripted_model: Path) -> Iterator[Server]:
    """A server for tests that do not stop it."""
    with starting_servers() as start:
        yield start("--model", str(scripted_model), *SCRIPTED)


def test_a_hangup_reloads_and_stops_nothing(server: Server) -> None:
    undisturbed = texts(streams(server, 4, 300))
    running = streams(server, 4, 300)
    first = server.worker().pid
    server.signal(signal.SIGHUP)
    assert texts(running) == undisturbed
    eventually(lambda: server.metric('ullm_reloads_total{outcome="succeeded"}') == 1)
    assert server.worker().pid != first
    assert texts([Stream(server, 20)])


@pytest.mark.skipif(shutil.which("nohup") is None, reason="needs nohup")
def test_a_hangup_under_nohup_does_nothing(serve: Serve, scripted_model: Path) -> None:
    ullm = [sys.executable, "-m", "ullm", "serve", "--port", "0"]
    server = serve(command=["nohup", *ullm, "--model", str(scripted_model), *SCRIPTED])
    server.signal(signal.SIGHUP)
    assert texts([Stream(server, 20)])
    assert server.metric('ullm_reloads_total{outcome="succeeded"}') == 0


def test_faults_are_armed_in_a_running_server(server: Server) -> None:
    restarts = server.metric("ullm_worker_restarts_total")
    refused = server.admin("POST", "/admin/faults", {"plan": "worker.step:explode"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "plan"
    armed = server.admin("POST", "/admin/faults", {"plan": "worker.step:crash@nth=5,times=1"})
    assert armed.status_code == 200, armed.text
    assert len(texts(streams(server, 2, 100))) == 2
    (fired,) = server.admin("GET", "/admin/faults").json()["fired"]
    assert (fired["point"], fired["action"]) == ("worker.step", "crash")
    assert server.admin("DELETE", "/admin/faults").json()["armed"] == []
    assert server.metric("ullm_worker_restarts_total") == restarts + 1
