"""A client that closes its connection leaves nothing open in the server."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio

from ullm.server.http.listener import Listener

pytestmark = pytest.mark.process


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok", "more_body": False})


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(5):  # well before an idle connection's end
        for _ in iter(holds, True):
            await trio.sleep(0.005)


@pytest.fixture
async def address(nursery: trio.Nursery) -> AsyncIterator[tuple[Listener, int]]:
    listener = Listener(app, stall_timeout=5, max_connections=100)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        await nursery.start(lambda task_status: listener.serve([sock], task_status=task_status))
        yield listener, sock.getsockname()[1]
        listener.stop()


@pytest.mark.parametrize("asks", [0, 1, 3])
async def test_its_socket_is_closed_at_once(address: tuple[Listener, int], asks: int) -> None:
    listener, port = address
    client = await trio.open_tcp_stream("127.0.0.1", port)
    for _ in range(asks):
        await client.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"ok"):
            answer += await client.receive_some()
    await until(lambda: listener.connections == 1)
    await client.aclose()
    await until(lambda: listener.connections == 0)
