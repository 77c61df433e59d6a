"""Streams in pieces: the same events over HTTP/1.1, HTTP/1.0 and HTTP/2; many connections at once."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import trio
from fake_engine import ByteTokenizer, FakeEngine, serving
from test_connection import connected, request

from ullm.server.http.listener import AT_ONCE, Listener

pytestmark = pytest.mark.process

ASKED: dict[str, Any] = {"prompt": "hi", "stream": True, "max_tokens": 6}
TOKENS = [70, 71, 72, 73, 74, 75]
WRITTEN = [ByteTokenizer().decode([token]).encode() for token in TOKENS]
CROWD = AT_ONCE + 20


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.script = lambda index: TOKENS
    return engine


def texts(events: bytes) -> list[bytes]:
    return [part.partition(b'"')[0] for part in events.split(b'"text":"')[1:]]


async def read_all(url: str, asked: bytes) -> tuple[bytes, bytes]:
    """Send a request; return the head and the body of the answer as they are on the wire."""
    async with connected(url) as connection:
        await connection.send_all(asked)
        head, _, body = b"".join([data async for data in connection]).partition(b"\r\n\r\n")
    return head, body


async def test_chunks_are_as_long_as_they_say(engine: FakeEngine) -> None:
    async with serving(engine) as url:
        head, body = await read_all(url, request(headers="Connection: close\r\n", **ASKED))
    assert b"transfer-encoding: chunked" in head.lower()
    events = b""
    while True:
        length, _, rest = body.partition(b"\r\n")
        size = int(length, 16)
        assert rest[size : size + 2] == b"\r\n"
        events, body = events + rest[:size], rest[size + 2 :]
        if size == 0:
            break
    assert body == b""
    assert texts(events) == WRITTEN
    assert events.endswith(b"data: [DONE]\n\n")


async def test_older_clients_get_no_chunks(engine: FakeEngine) -> None:
    async with serving(engine) as url:
        asked = request(**ASKED).replace(b"HTTP/1.1", b"HTTP/1.0")
        head, body = await read_all(url, asked)
    assert b"transfer-encoding" not in head.lower()
    assert texts(body) == WRITTEN
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


async def test_newer_clients_have_frames(engine: FakeEngine) -> None:
    async with (
        serving(engine, http2=True) as url,
        httpx.AsyncClient(http1=False, http2=True) as client,
    ):
        answer = await client.post(f"{url}/v1/completions", json=ASKED)
    assert answer.http_version == "HTTP/2"
    assert texts(answer.content) == WRITTEN


async def test_a_connection_goes_on_after_a_stream(engine: FakeEngine) -> None:
    async with serving(engine) as url, connected(url) as connection:
        for _ in range(3):
            await connection.send_all(request(**ASKED))
            answer = b""
            while not answer.endswith(b"\r\n0\r\n\r\n"):
                answer += await connection.receive_some()
            assert texts(answer) == WRITTEN


async def test_a_crowd_is_let_in_at_once() -> None:
    """Not one per turn of an event loop that is busy with other connections."""
    listener = Listener(None, stall_timeout=5, max_connections=CROWD - 10)
    with ExitStack() as stack:
        sock = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=CROWD))
        for _ in range(CROWD):
            stack.enter_context(socket.create_connection(sock.getsockname()))
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: listener.serve([sock], task_status=task_status))
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            assert listener.connections == CROWD - 10, "and no more than there may be"
            nursery.cancel_scope.cancel()
