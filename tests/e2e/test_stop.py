"""Signals to a real server with streams in flight."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from conftest import SCRIPTED, Server, eventually, is_gone

pytestmark = pytest.mark.process

Serve = Callable[..., Server]


class Stream:
    """One streamed completion, read in a thread until it ends, however that happens."""

    def __init__(self, server: Server, max_tokens: int, prompt: list[int] | None = None) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self.done = False
        self.error: Exception | None = None
        self.failure: dict[str, str] | None = None
        self.begun = threading.Event()
        self._body = {
            "model": server_model(server),
            "prompt": prompt or [300, 301],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        self.usage: dict[str, int] | None = None
        self.gap = 0.0
        self._url = f"{server.url}/v1/completions"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last = time.monotonic()
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=60) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self._take(line[6:])
                        self.gap, last = max(self.gap, time.monotonic() - last), time.monotonic()
        except httpx.HTTPError as error:
            self.error = error
        self.begun.set()

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self.failure = chunk["error"]
            return
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            self.begun.set()

    def join(self, timeout: float = 60) -> Stream:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the stream has no end"
        return self


def server_model(server: Server) -> str:
    with server.client() as client:
        name: str = client.get("/v1/models").json()["data"][0]["id"]
        return name


def streams(server: Server, count: int, max_tokens: int) -> list[Stream]:
    """Streams that have all begun."""
    found = [Stream(server, max_tokens, [300 + number]) for number in range(count)]
    for stream in found:
        assert stream.begun.wait(30)
    return found


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
