"""Signals while the server starts, sleeps, restarts a worker, or takes on new ones: the same path for all."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.support.server import SCRIPTED, Serve, is_gone
from tests.support.streams import Stream, streams, texts
from tests.support.waiting import eventually

pytestmark = pytest.mark.process

GONE_SECONDS = 2.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_loading(serve: Serve, scripted_model: Path, number: int) -> None:
    server = serve(
        *("--model", str(scripted_model), *SCRIPTED, "--log-level", "debug"),
        environ={"ULLM_SCRIPTED_LOAD_SECONDS": "60"},
        wait=False,
    )
    server.hear("worker starting.*load")
    server.signal(number)
    assert server.wait(GONE_SECONDS) == 0


def test_a_thread_that_loads_cannot_hold_the_process(serve: Serve, scripted_model: Path) -> None:
    """Nobody can interrupt it; it is left behind."""
    load = {"ULLM_SCRIPTED_LOAD_SECONDS": "60"}
    options = ("--transport", "thread", "--log-level", "debug")
    server = serve("--model", str(scripted_model), *SCRIPTED, *options, environ=load, wait=False)
    server.hear("worker starting.*load")
    server.signal(signal.SIGTERM)
    assert server.wait(GONE_SECONDS) == 71


@pytest.mark.e2e
@pytest.mark.parametrize("moment", ["spawned", pytest.param("loading", marks=pytest.mark.slow)])
def test_while_the_real_model_loads(serve: Serve, real_model: Path, moment: str) -> None:
    server = serve("--log-level", "debug", wait=False)
    if moment == "spawned":
        eventually(lambda: server.workers())
    else:
        server.hear("worker starting.*load")
    server.signal(signal.SIGTERM)
    began = time.monotonic()
    assert server.wait() == 0
    assert time.monotonic() - began < GONE_SECONDS


def test_probes_answer_while_it_loads(serve: Serve, scripted_model: Path) -> None:
    options = {"environ": {"ULLM_SCRIPTED_LOAD_SECONDS": "60"}, "wait": False}
    server = serve("--model", str(scripted_model), *SCRIPTED, **options)
    server.find_url()
    assert server.get("/live").status_code == 200
    assert server.get("/ready").status_code == 503
    assert server.state() == "starting"
    early = server.complete(max_tokens=1)
    assert (early.status_code, early.json()["error"]["code"]) == (503, "not_ready")
    server.signal(signal.SIGTERM)
    assert server.wait(GONE_SECONDS) == 0


@pytest.mark.parametrize("level", [*(pytest.param(level, marks=pytest.mark.slow) for level in (0, 1, 2)), 3])
def test_while_asleep(serve: Serve, scripted_model: Path, transport: tuple[str, str], level: int) -> None:
    """What was kept for the time after the sleep is admitted: it runs to its end."""
    server = serve("--model", str(scripted_model), *SCRIPTED, *transport)
    running = streams(server, 2, 100)
    assert server.admin("POST", "/sleep", {"level": level, "mode": "keep"}).json()["state"] == "asleep"
    server.signal(signal.SIGTERM)
    eventually(lambda: server.get("/ready").status_code == 503)
    texts(running)
    assert server.wait() == 0
    assert "2 drained, 0 aborted, 0 killed, 0 abandoned" in server.errors().splitlines()[-1]


@pytest.mark.parametrize(
    "level", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_while_asleep_without_work(serve: Serve, scripted_model: Path, level: int) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED)
    server.admin("POST", "/sleep", {"level": level})
    server.signal(signal.SIGTERM)
    assert server.wait(GONE_SECONDS) == 0
    assert "awake" not in server.errors(), "nobody wakes it for that"


def test_while_falling_asleep(serve: Serve, scripted_model: Path) -> None:
    """A sleep that waits for requests is called off; who asked for it hears so."""
    server = serve("--model", str(scripted_model), *SCRIPTED)
    running = streams(server, 2, 200)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(server.admin("POST", "/sleep", {"level": 1})))
    asking.start()
    eventually(lambda: server.get("/health").json()["sleep"]["state"] == "falling_asleep")
    server.signal(signal.SIGTERM)
    texts(running)
    asking.join()
    assert answers[0].status_code in (200, 409)
    assert server.wait() == 0


def test_while_a_worker_restarts(serve: Serve, scripted_model: Path) -> None:
    load = {"ULLM_SCRIPTED_LOAD_SECONDS": "0.7"}
    options = ("--standby-workers", "0")
    server = serve("--model", str(scripted_model), *SCRIPTED, *options, environ=load)
    running = streams(server, 3, 100)
    server.worker().kill()
    server.wait_state("restarting")
    server.signal(signal.SIGTERM)
    server.wait_state("draining")
    texts(running)
    assert server.wait() == 0
    assert "3 drained, 0 aborted" in server.errors().splitlines()[-1]


def test_while_reloading(serve: Serve, scripted_model: Path) -> None:
    load = {"ULLM_SCRIPTED_LOAD_SECONDS": "0.7"}
    options = ("--standby-workers", "0")
    server = serve("--model", str(scripted_model), *SCRIPTED, *options, environ=load)
    running = streams(server, 3, 150)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(server.admin("POST", "/admin/reload")))
    asking.start()
    server.hear("reloading")
    server.signal(signal.SIGTERM)
    texts(running)
    asking.join()
    assert answers[0].status_code in (200, 409)
    assert server.wait() == 0
    assert "3 drained, 0 aborted" in server.errors().splitlines()[-1]


@pytest.mark.parametrize("level", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_budget_used_up_asleep(serve: Serve, scripted_model: Path, level: int) -> None:
    """A worker that takes too long to wake up does not hold up the stop."""
    wake = {"ULLM_SCRIPTED_WAKE_SECONDS": "60"}
    options = ("--shutdown-timeout", "4", "--standby-workers", "0")
    server = serve("--model", str(scripted_model), *SCRIPTED, *options, environ=wake)
    (stream,) = streams(server, 1, 1000)
    server.admin("POST", "/sleep", {"level": level, "mode": "keep"})
    if level == 3:
        server.admin("POST", "/admin/faults", {"plan": "worker.start:hang"})
    server.signal(signal.SIGTERM)
    began = time.monotonic()
    assert stream.join().finish_reason == "abort"
    assert stream.text
    assert server.wait() == 0
    assert time.monotonic() - began < 5


def test_a_server_killed_while_asleep_leaves_nothing(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED)
    server.admin("POST", "/sleep", {"level": 1})
    workers = server.workers()
    server.process.kill()
    server.process.wait()
    eventually(lambda: all(map(is_gone, workers)), seconds=1)


def test_a_server_killed_while_loading_leaves_nothing(serve: Serve, scripted_model: Path) -> None:
    load = {"ULLM_SCRIPTED_LOAD_SECONDS": "60"}
    server = serve("--model", str(scripted_model), *SCRIPTED, environ=load, wait=False)
    eventually(lambda: server.workers())
    workers = server.workers()
    server.process.kill()
    server.process.wait()
    eventually(lambda: all(map(is_gone, workers)), seconds=1)


def test_unary_requests_wait_for_the_restart_too(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED)
    with server.worker_held(until=3):
        running = [Stream(server, 150, [300 + n], stream=False) for n in range(3)]
    server.worker().kill()
    server.signal(signal.SIGTERM)
    texts(running)
    assert server.wait() == 0
