"""Signals to a real server with streams in flight."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.server import SCRIPTED, Serve, is_gone
from tests.support.streams import Stream, streams, texts
from tests.support.waiting import eventually

pytestmark = pytest.mark.process

ENDLESS = 3000
"""Tokens that take 15 s: more than any of these tests."""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_drains_and_then_ends_at_once(
    serve: Serve, scripted_model: Path, transport: tuple[str, str], number: int
) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, *transport)
    running = streams(server, 8, 150)
    server.signal(number)
    with server.client() as client:
        eventually(lambda: client.get("/ready").status_code == 503)
        assert client.get("/live").status_code == 200
        health = client.get("/health")
        assert (health.status_code, health.json()["state"]) == (503, "draining")
        late = client.post("/v1/completions", json={"model": "scripted", "prompt": "x"})
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "draining"
        assert late.headers["connection"] == "close"
        assert float(late.headers["retry-after"]) > 0
    texts(running)
    ended = time.monotonic()
    assert server.wait() == 0
    assert time.monotonic() - ended < 20, "no waiting for the deadline, which is 25 s away"
    assert "8 drained, 0 aborted, 0 killed" in server.errors().splitlines()[-1]


def test_queued_requests_are_admitted_too(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--max-bs", "2")
    found = [Stream(server, 60, [300 + number]) for number in range(6)]
    eventually(lambda: server.metric("ullm_num_requests_waiting") == 4)
    server.signal(signal.SIGTERM)
    texts(found)
    assert server.wait() == 0
    assert "6 drained, 0 aborted, 0 killed" in server.errors().splitlines()[-1]


def test_an_administrator_asks_for_the_stop(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED)
    running = streams(server, 2, 100)
    assert server.admin("POST", "/admin/shutdown", {"timeout": 20}).json()["state"] == "draining"
    assert server.state() == "draining"
    texts(running)
    assert server.wait() == 0
    assert "by admin: 2 drained" in server.errors().splitlines()[-1]


def test_the_deadline_aborts_with_tokens_usage_and_done(
    serve: Serve, scripted_model: Path, transport: tuple[str, str]
) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, *transport, "--shutdown-timeout", "4")
    running = [*streams(server, 3, ENDLESS), Stream(server, ENDLESS, stream=False)]
    eventually(lambda: server.metric("ullm_num_requests_running") == 4)
    server.signal(signal.SIGTERM)
    began = time.monotonic()
    for stream in running:
        stream.join()
        assert (stream.status, stream.finish_reason) == (200, "abort")
        assert stream.text
        assert stream.usage is not None
        assert stream.usage["completion_tokens"] > 0
    assert [stream.done for stream in running] == [True, True, True, False]
    assert server.wait() == 0
    assert time.monotonic() - began < 4.5
    assert "0 drained, 4 aborted, 0 killed" in server.errors().splitlines()[-1]


def test_no_drain_at_all(serve: Serve, scripted_model: Path, transport: tuple[str, str]) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, *transport, "--shutdown-timeout", "0")
    (stream,) = streams(server, 1, ENDLESS)
    server.signal(signal.SIGTERM)
    began = time.monotonic()
    assert stream.join().finish_reason == "abort"
    assert stream.done
    assert server.wait() == 0
    assert time.monotonic() - began < 3, "the reserve for the teardown"


def test_a_second_signal_skips_the_drain(
    serve: Serve, scripted_model: Path, transport: tuple[str, str]
) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, *transport)
    (stream,) = streams(server, 1, ENDLESS)
    server.signal(signal.SIGTERM)
    server.wait_state("draining")
    server.signal(signal.SIGINT)
    assert stream.join().finish_reason == "abort"
    assert stream.usage is not None
    assert server.wait(20) == 0, "sooner than the drain would have ended"
    server.hear(r"stopped in .*drain \d+\.\d\d s hurried")


@pytest.mark.parametrize("third", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.timing
def test_a_third_signal_leaves_now(
    serve: Serve, scripted_model: Path, transport: tuple[str, str], third: int
) -> None:
    """A worker that hangs in its stop holds the second stage open for it."""
    server = serve("--model", str(scripted_model), *SCRIPTED, *transport, "--faults", "worker.stop:hang")
    (stream,) = streams(server, 1, ENDLESS)
    workers = server.workers()
    server.signal(signal.SIGTERM)
    server.hear("signal=SIGTERM count=1")
    server.signal(signal.SIGTERM)
    server.hear("signal=SIGTERM count=2")
    assert stream.join().finish_reason == "abort"
    server.signal(third)
    began = time.monotonic()
    assert server.wait() == 128 + third
    eventually(lambda: all(map(is_gone, workers)), seconds=1)
    assert time.monotonic() - began < 1


def test_without_work_it_ends_at_once(serve: Serve, scripted_model: Path, transport: tuple[str, str]) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, *transport)
    server.signal(signal.SIGTERM)
    began = time.monotonic()
    assert server.wait() == 0
    assert time.monotonic() - began < 20, "no waiting for the deadline, which is 25 s away"


def test_a_worker_that_ignores_its_budget_is_killed(serve: Serve, scripted_model: Path) -> None:
    options = ("--shutdown-timeout", "3", "--faults", "worker.stop:hang")
    server = serve("--model", str(scripted_model), *SCRIPTED, *options)
    worker = server.worker()
    (stream,) = streams(server, 1, 20)
    texts([stream])
    server.signal(signal.SIGTERM)
    server.hear("does not stop: SIGTERM")
    server.hear("does not stop: SIGKILL")
    assert server.wait() == 0
    assert is_gone(worker)
    assert "0 aborted, 1 killed, 0 abandoned" in server.errors().splitlines()[-1]


def test_a_thread_that_ignores_its_budget_is_abandoned(serve: Serve, scripted_model: Path) -> None:
    options = ("--transport", "thread", "--shutdown-timeout", "3", "--faults", "worker.stop:hang")
    server = serve("--model", str(scripted_model), *SCRIPTED, *options)
    server.signal(signal.SIGTERM)
    assert server.wait() == 71
    assert "0 killed, 1 abandoned" in server.hear("engine stopped.*")


def test_a_killed_server_leaves_no_worker(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--replicas", "2", "--standby-workers", "1")
    running = streams(server, 2, ENDLESS)
    workers = server.workers()
    assert len(workers) >= 2
    server.process.kill()
    server.process.wait()
    eventually(lambda: all(map(is_gone, workers)), seconds=1)
    for stream in running:
        assert stream.join().error is not None


def test_a_suspended_worker_of_a_killed_server_is_gone_too(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED)
    worker = server.worker()
    os.kill(worker.pid, signal.SIGSTOP)
    server.process.kill()
    eventually(lambda: is_gone(worker), seconds=1)
