"""Signals to a real server with streams in flight."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import SCRIPTED, Server, eventually, is_gone, streams

pytestmark = pytest.mark.process

Serve = Callable[..., Server]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_then_ends_at_once(serve: Serve, scripted_model: Path, number: int) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED)
    running = streams(server, 8, 150)
    server.signal(number)
    with server.client() as client:
        eventually(lambda: client.get("/ready").status_code == 503)
        assert client.get("/live").status_code == 200
        assert client.get("/health").json()["state"] == "draining"
        late = client.post("/v1/completions", json={"model": "scripted", "prompt": "x"})
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "draining"
        assert "retry-after" in late.headers
    ends = [stream.join() for stream in running]
    ended = time.monotonic()
    assert server.wait() == 0
    assert time.monotonic() - ended < 3, "no waiting for a timer"
    assert [(stream.finish_reason, stream.done) for stream in ends] == [("length", True)] * 8
    assert "8 drained, 0 aborted, 0 killed" in server.errors().splitlines()[-1]


def test_the_deadline_aborts_with_tokens_usage_and_done(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--shutdown-timeout", "4")
    running = streams(server, 4, 3000)
    server.signal(signal.SIGTERM)
    began = time.monotonic()
    for stream in running:
        stream.join()
        assert (stream.finish_reason, stream.done) == ("abort", True)
        assert stream.text
        assert stream.usage is not None
        assert stream.usage["completion_tokens"] > 0
    assert server.wait() == 0
    assert time.monotonic() - began < 4.5


def test_no_drain_at_all(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--shutdown-timeout", "0")
    (stream,) = streams(server, 1, 3000)
    server.signal(signal.SIGTERM)
    assert stream.join().finish_reason == "abort"
    assert server.wait(5) == 0


def test_a_second_signal_skips_the_drain(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED)
    (stream,) = streams(server, 1, 3000)
    server.signal(signal.SIGTERM)
    with server.client() as client:
        eventually(lambda: client.get("/ready").status_code == 503)
    server.signal(signal.SIGTERM)
    assert stream.join().finish_reason == "abort"
    assert server.wait(5) == 0


def test_a_third_signal_leaves_now(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED)
    (stream,) = streams(server, 1, 3000)
    for _ in range(3):
        server.signal(signal.SIGTERM)
        time.sleep(0.02)  # equal signals that come together are one
    # The second may have been enough.
    assert server.wait(3) in (0, 128 + signal.SIGTERM)
    stream.join()


def test_without_work_it_ends_at_once(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED)
    server.signal(signal.SIGTERM)
    began = time.monotonic()
    assert server.wait() == 0
    assert time.monotonic() - began < 2


def test_a_signal_while_loading(serve: Serve, scripted_model: Path) -> None:
    server = serve(
        "--model", str(scripted_model), *SCRIPTED, environ={"ULLM_SCRIPTED_LOAD_SECONDS": "60"}, wait=False
    )
    eventually(lambda: len(server.workers()) == 1)
    server.signal(signal.SIGTERM)
    assert server.wait(2.5) == 0


def test_a_killed_server_leaves_no_worker(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED)
    (stream,) = streams(server, 1, 3000)
    worker = server.worker()
    server.process.kill()
    server.wait()
    eventually(lambda: is_gone(worker), seconds=1)
    stream.join()
