"""Targets and framing of HTTP/1.1 requests that RFC 9112 has rules for; bodies that nobody takes."""

from __future__ import annotations

import json

import pytest
import trio
import trio.testing
from fake_engine import FakeEngine, serving
from test_connection import connected, read_until, request

from ullm.server.http import quart_connection

pytestmark = pytest.mark.process

BODY = json.dumps({"prompt": "hi", "max_tokens": 3}).encode()
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
KIND = "Content-Type: application/json\r\n"


def chunked(headers: str = "", version: str = "1.1") -> bytes:
    head = f"POST /v1/completions HTTP/{version}\r\nHost: localhost\r\n{KIND}{headers}"
    return head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED


@pytest.mark.parametrize("length", [0, 5, len(CHUNKED), 10_000_000])
async def test_a_length_beside_a_transfer_encoding(url: str, length: int) -> None:
    """The encoding counts, and nothing that follows on the connection is taken (RFC 9112, 6.1, 6.3)."""
    async with connected(url) as connection:
        await connection.send_all(chunked(f"Content-Length: {length}\r\n") + request("GET", "/live"))
        with trio.fail_after(60):
            answer = b"".join([data async for data in connection])
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer.lower()
    assert answer.count(b"HTTP/1.1 ") == 1


async def test_a_transfer_encoding_of_an_older_client(url: str) -> None:
    async with connected(url) as connection:
        await connection.send_all(chunked("Connection: keep-alive\r\n", version="1.0"))
        with trio.fail_after(60):
            answer = b"".join([data async for data in connection])
    assert b" 200 " in answer.splitlines()[0]


async def test_a_transfer_encoding_alone_keeps_the_connection(url: str) -> None:
    async with connected(url) as connection:
        for _ in range(2):
            await connection.send_all(chunked())
            assert b"close" not in await read_until(connection, b"}]")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://localhost/live", 200),
        ("HTTP://127.0.0.1:8000/live?a=b", 200),
        ("https://localhost/live", 200),
        ("http://localhost", 200),
        ("http://localhost?a", 200),
        ("ftp://localhost/live", 404),
        ("http://localhost/nowhere", 404),
        ("http://other.example/live", 403),  # the target's host counts, not the header's
    ],
)
async def test_targets_in_absolute_form(url: str, target: str, status: int) -> None:
    async with connected(url) as connection:
        await connection.send_all(
            f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join([data async for data in connection])
    assert int(answer.split()[1]) == status


@pytest.mark.parametrize("version", ["2.0", "3.0", "0.9"])
async def test_other_versions_are_refused(url: str, version: str) -> None:
    async with connected(url) as connection:
        await connection.send_all(f"GET /live HTTP/{version}\r\nHost: localhost\r\n\r\n".encode())
        answer = b"".join([data async for data in connection])
    assert answer.startswith(b"HTTP/1.1 505")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "http_version_not_supported"
    assert "--http2" in error["message"]


async def test_a_body_that_nobody_takes_does_not_hold_the_slot(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler has answered and gone; what still comes is dropped, and the connection ends."""
    monkeypatch.setattr(quart_connection, "LINGER_SECONDS", 0.05)
    monkeypatch.setattr("ullm.server.serve.connection_limit", lambda: 1)
    async with serving(engine) as url:
        async with connected(url) as connection:
            head = f"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n{KIND}Content-Length: 100000000\r\n\r\n"
            await connection.send_all(head.encode())
            with trio.move_on_after(60) as scope:
                try:
                    while True:
                        await connection.send_all(b" " * 65536)
                except trio.BrokenResourceError:
                    pass
            assert not scope.cancelled_caught
        async with connected(url) as connection:
            await connection.send_all(request("GET", "/live"))
            assert b"live" in await read_until(connection, b"}")


async def test_a_request_behind_the_last_answer_does_not_hold_the_slot(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for its turn, which does not come."""
    monkeypatch.setattr("ullm.server.serve.connection_limit", lambda: 1)
    engine.hold_after = 1
    async with serving(engine) as url:
        for _ in range(2):
            async with connected(url) as connection:
                asked = request(prompt="hi", max_tokens=3, headers="Connection: close\r\n")
                await connection.send_all(asked)
                with trio.fail_after(60):
                    await engine.held.wait()
                    await connection.send_all(request("GET", "/live"))
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    engine.release.set()
                    answer = b"".join([data async for data in connection])
            assert answer.count(b"HTTP/1.1 ") == 1
