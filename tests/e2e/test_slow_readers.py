"""Clients that read slowly, or not at all, among others that read as they should."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.server import SCRIPTED, Serve, Server
from tests.support.streams import Stream, streams, texts
from tests.support.waiting import eventually

pytestmark = pytest.mark.process

LONG = 3000
"""Tokens; far more bytes than the buffers between server and client hold."""


@contextmanager
def raw_client(server: Server, max_tokens: int, prompt: int = 300) -> Iterator[socket.socket]:
    """A client with a small receive buffer that has asked for a stream."""
    host, port = server.url.removeprefix("http://").split(":")
    body = {"prompt": [prompt, 301], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    content = json.dumps({**body, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "Connection: close\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect((host, int(port)))
        sock.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield sock


@contextmanager
def stalled(server: Server, max_tokens: int = LONG) -> Iterator[socket.socket]:
    """A client that reads the first bytes of its stream, and no more."""
    with raw_client(server, max_tokens) as sock:
        assert sock.recv(64).startswith(b"HTTP/1.1 200")
        yield sock


def read_slowly(sock: socket.socket, size: int, pause: float) -> list[dict[str, Any]]:
    """The events of a stream that ends with the connection."""
    data = b""
    while more := sock.recv(size):
        data += more
        time.sleep(pause)
    events = [line.removeprefix(b"data: ") for line in data.split(b"\n") if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    return [json.loads(event) for event in events[:-1]]


def ends_with_a_reset(sock: socket.socket) -> bool:
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    return False


def running(server: Server) -> float:
    return server.metric("ullm_num_requests_running")


def test_a_stalled_reader_is_cut_and_nobody_else_notices(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--stall-timeout", "1")
    undisturbed = texts(streams(server, 4, 300))
    with stalled(server) as sock:
        others = streams(server, 4, 300)
        assert texts(others) == undisturbed
        assert max(stream.gap for stream in others) < 1
        eventually(lambda: running(server) == 0)
        assert server.metric('ullm_requests_total{finish_reason="abort"}') == 1
        assert ends_with_a_reset(sock)
    server.hear("does not read")
    assert texts([Stream(server, 50)])


def test_a_slow_reader_gets_larger_chunks_and_everything(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--stall-timeout", "2")
    tokens = 800
    (whole,) = texts([Stream(server, tokens, [300, 301])])
    with raw_client(server, tokens) as sock:
        (other,) = streams(server, 1, 300)
        events = read_slowly(sock, 512, 0.05)
    texts([other])
    assert other.gap < 1
    assert "".join(event["choices"][0]["text"] for event in events) == whole
    assert len(events) < tokens / 2, "tokens that pile up become one event"
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_memory_stays_bounded(serve: Serve, scripted_model: Path) -> None:
    """What is not read waits as token ids, in the server; the kernel keeps a few kilobytes."""
    server = serve("--model", str(scripted_model), *SCRIPTED, "--stall-timeout", "60")
    texts(streams(server, 8, 100))
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    with ExitStack() as stack:
        for _ in range(32):
            stack.enter_context(stalled(server, max_tokens=1200))
        eventually(lambda: running(server) == 0, seconds=60)  # all are computed, none has been read
        assert process.memory_info().rss - before < 32 << 20
        assert texts([Stream(server, 100)])
    eventually(lambda: server.metric("ullm_admitted_tokens") == 0)


@pytest.mark.parametrize("signals", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_stop_does_not_wait_for_who_does_not_read(
    serve: Serve, scripted_model: Path, transport: tuple[str, str], signals: int
) -> None:
    """The others' streams end as usual, the process in time, with the status of an orderly stop."""
    options = ("--shutdown-timeout", "6", *transport)
    server = serve("--model", str(scripted_model), *SCRIPTED, *options)
    with stalled(server):
        others = streams(server, 4, 200)
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        if signals == 1:
            texts(others)
        else:
            server.wait_state("draining")
            server.signal(signal.SIGTERM)
            for stream in others:
                assert stream.join().finish_reason == "abort"
                assert stream.done
        assert server.wait() == 0
        assert time.monotonic() - began < (6 if signals == 1 else 3.5)
    assert "0 killed, 0 abandoned" in server.errors().splitlines()[-1]
