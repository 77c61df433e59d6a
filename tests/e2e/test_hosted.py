"""``hypercorn ullm.app:app``: the tables' rows as far as that command allows; see docs/how-to/hosting.md."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.server import Serve, Server, is_gone
from tests.support.streams import Stream, streams, texts
from tests.support.waiting import eventually

pytestmark = pytest.mark.process

Host = Callable[..., Server]


@pytest.fixture(params=["asyncio", pytest.param("trio", marks=pytest.mark.slow)])
def host(request: pytest.FixtureRequest, serve: Serve, scripted_model: Path) -> Host:
    """Starts Hypercorn with either worker class; options are ``ULLM_*`` variables."""

    def start(*, wait: bool = True, **options: str) -> Server:
        variables = {"ULLM_MODEL": str(scripted_model), "ULLM_LOAD_FORMAT": "dummy"}
        variables["ULLM_RUNNER"] = "ullm.testing:ScriptedRunner"
        command = [
            sys.executable,
            "-m",
            "hypercorn",
            "-k",
            request.param,
            "-b",
            "127.0.0.1:0",
            "ullm.app:app",
        ]
        return serve(
            command=command,
            environ=variables | {f"ULLM_{name.upper()}": value for name, value in options.items()},
            ready=r"Running on (http://\S+)",
            wait=wait,
        )

    return start


@pytest.mark.parametrize("how", ["process", pytest.param("thread", marks=pytest.mark.slow)])
def test_a_stop_drains(host: Host, how: str) -> None:
    server = host(transport=how)
    running = [*streams(server, 4, 800), Stream(server, 800, stream=False)]
    eventually(lambda: server.metric("ullm_num_requests_running") == 5)
    server.signal(signal.SIGTERM)
    with server.client() as client:
        eventually(lambda: client.get("/ready").status_code == 503)
        assert client.get("/live").status_code == 200
        assert client.get("/health").json()["state"] == "draining"
        late = client.post("/v1/completions", json={"prompt": "x"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert int(late.headers["retry-after"]) > 0
    texts(running)
    assert server.wait() == 0
    assert "0 aborted, 0 killed, 0 abandoned" in server.errors()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group_drains_too(host: Host, number: int) -> None:
    """As a terminal's Ctrl-C or a service manager sends it; further ones do not hurry."""
    server = host()
    running = streams(server, 4, 600)
    os.killpg(server.process.pid, number)
    eventually(lambda: server.get("/ready").status_code == 503)
    server.signal(signal.SIGTERM)
    texts(running)
    assert server.wait() == 0


def test_a_hangup_while_it_loads_changes_nothing(host: Host) -> None:
    server = host(wait=False, scripted_load_seconds="1")
    eventually(lambda: server.workers())
    (worker,) = server.workers()
    worker.parent().send_signal(signal.SIGHUP)
    server.wait_ready()
    assert server.get("/live").status_code == 200


def test_the_deadline_aborts_with_tokens_usage_and_done(host: Host) -> None:
    server = host(shutdown_timeout="4")
    running = [*streams(server, 2, 3000), Stream(server, 3000, stream=False)]
    eventually(lambda: server.metric("ullm_num_requests_running") == 3)
    server.signal(signal.SIGTERM)
    for stream in running:
        stream.join()
        assert (stream.status, stream.finish_reason) == (200, "abort")
        assert stream.usage is not None
    assert [stream.done for stream in running] == [True, True, False]
    assert server.wait() == 0


def test_lost_workers_cost_a_pause(host: Host) -> None:
    server = host(step_timeout="1")
    undisturbed = texts(streams(server, 4, 150))
    for number in (signal.SIGKILL, signal.SIGSTOP):
        running = streams(server, 4, 150)
        worker = server.worker()
        worker.send_signal(number)
        assert texts(running) == undisturbed
        assert is_gone(worker)
    assert server.metric("ullm_worker_restarts_total") == 2


def test_an_engine_beyond_its_limits_is_dead_to_all_probes(host: Host) -> None:
    server = host(max_restarts="0")
    (stream,) = streams(server, 1, 3000)
    server.worker().kill()
    stream.join()
    assert stream.failure is not None
    assert stream.failure["code"] == "engine_dead"
    assert "was killed by SIGKILL" in stream.failure["message"]
    eventually(lambda: server.get("/live").status_code == 503)
    assert server.complete(max_tokens=1).status_code >= 500


def test_it_sleeps_wakes_and_reloads(host: Host) -> None:
    server = host()
    undisturbed = texts(streams(server, 2, 50))
    for level in (0, 1, 2, 3):
        assert server.admin("POST", "/sleep", {"level": level}).json()["level"] == level
        assert server.get("/is_sleeping").json()["is_sleeping"]
        assert texts(streams(server, 2, 50)) == undisturbed
    running = streams(server, 2, 50)
    assert server.admin("POST", "/admin/reload").status_code == 200
    assert texts(running) == undisturbed
    server.admin("POST", "/sleep", {"level": 1})
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_clients_that_leave_free_their_blocks(host: Host) -> None:
    server = host()
    running = streams(server, 3, 3000)
    for stream in running:
        stream.leave()
    eventually(lambda: server.metric("ullm_kv_cache_usage_ratio") == 0)
    assert server.metric("ullm_num_requests_running") == 0


def test_killed_it_leaves_no_worker(host: Host) -> None:
    server = host()
    streams(server, 2, 3000)
    workers = server.workers()
    below = [process for process in server.children() if process not in workers]
    # Python's resource tracker stays, to clean up after the others: Hypercorn has semaphores.
    serving = [process for process in below if "resource_tracker" not in " ".join(process.cmdline())]
    for process in (psutil.Process(server.process.pid), *serving):
        process.kill()
    server.process.wait()
    eventually(lambda: all(map(is_gone, workers)), seconds=1)
