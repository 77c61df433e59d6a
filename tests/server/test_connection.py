"""Connections: disconnects, keep-alive, slow readers, and the stop of the server."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import httpx
import pytest
import trio
import trio.testing
from fake_engine import FakeEngine, serving

from ullm.config import ServerConfig
from ullm.errors import ConfigError, PortTaken
from ullm.server import bind, serve_http, urls, warn_if_open
from ullm.server.http.listener import Listener
from ullm.supervision.actor import Lifetime

pytestmark = pytest.mark.process


@asynccontextmanager
async def connected(url: str, receive_buffer: int | None = None) -> AsyncIterator[trio.SocketStream]:
    """Connect; a small receive buffer fills up soon, if it is set before connecting."""
    sock = trio.socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, receive_buffer)
    await sock.connect(_address(url))
    async with trio.SocketStream(sock) as stream:
        yield stream


def request(method: str = "POST", path: str = "/v1/completions", headers: str = "", **body: Any) -> bytes:
    content = json.dumps(body).encode() if body else b""
    kind = f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}{kind}\r\n".encode() + content


async def read_until(stream: trio.SocketStream, mark: bytes) -> bytes:
    data = b""
    with trio.fail_after(60):
        while mark not in data:
            more = await stream.receive_some()
            assert more, data
            data += more
    return data


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hi", ["a", "b"]])
async def test_a_disconnect_aborts_the_request(
    engine: FakeEngine, url: str, stream: bool, prompt: Any
) -> None:
    engine.hold_after = 3
    async with connected(url) as connection:
        await connection.send_all(request(prompt=prompt, stream=stream))
        await engine.held.wait()
        if stream:
            await read_until(connection, b"data: ")
        assert engine.active
    with trio.fail_after(60):
        await engine.all_gone.wait()
    assert engine.aborted == len(engine.admitted)


async def test_a_disconnect_of_a_client_that_does_not_read(engine: FakeEngine, url: str) -> None:
    """Its stream is stuck in a send, and still ends when the connection does."""
    engine.script = lambda index: [70] * 1_000_000
    async with connected(url, receive_buffer=4096) as connection:
        await connection.send_all(request(prompt="hi", stream=True, max_tokens=1_000_000))
        await read_until(connection, b"data: ")
    with trio.fail_after(60):
        await engine.all_gone.wait()
    assert engine.aborted == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_connection_close_closes(url: str, stream: bool) -> None:
    async with connected(url) as connection:
        await connection.send_all(request(headers="Connection: close\r\n", prompt="hi", stream=stream))
        with trio.fail_after(60):
            answer = b"".join([data async for data in connection])
    assert answer.startswith(b"HTTP/1.1 200")


async def test_a_connection_serves_many_requests(url: str) -> None:
    async with connected(url) as connection:
        for _ in range(3):
            await connection.send_all(request(prompt="hi", stream=True))
            assert b"[DONE]" in await read_until(connection, b"0\r\n\r\n")
            await connection.send_all(request("GET", "/live"))
            assert b'"live"' in await read_until(connection, b"}")


async def test_pipelined_requests_are_answered_in_order(url: str) -> None:
    async with connected(url) as connection:
        await connection.send_all(request("GET", "/live") + request("GET", "/version"))
        answer = await read_until(connection, b'"version"')
    assert answer.index(b'"status"') < answer.index(b'"version"')


async def test_five_hundred_streams_at_once(engine: FakeEngine, url: str) -> None:
    engine.script = lambda index: [70] * 20
    done = 0

    async def one() -> None:
        nonlocal done
        async with connected(url) as connection:
            asked = request(headers="Connection: close\r\n", prompt="x", stream=True, max_tokens=20)
            await connection.send_all(asked)
            answer = b"".join([data async for data in connection])
            assert answer.count(b'"text":"') == 20
            assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(500):
            nursery.start_soon(one)
    assert done == 500
    assert not engine.active
    assert engine.aborted == 0


# --- listening and stopping --------------------------------------------------------------------


def test_a_taken_port_is_known_at_once() -> None:
    with bind(ServerConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(PortTaken, match=f"127.0.0.1:{port}"):
            bind(ServerConfig(port=port))
    bind(ServerConfig(port=port)).close()


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(ConfigError, match="--host"):
        bind(ServerConfig(host="192.0.2.1"))
    with pytest.raises(ConfigError, match="--host"):
        bind(ServerConfig(host="no such host.invalid"))


def test_urls_have_the_real_port() -> None:
    with bind(ServerConfig(port=0)) as sock:
        assert urls([sock]) == [f"http://127.0.0.1:{sock.getsockname()[1]}"]
        assert urls([sock], "https") == [f"https://127.0.0.1:{sock.getsockname()[1]}"]


async def test_running_requests_finish_when_the_server_is_stopped(engine: FakeEngine) -> None:
    engine.hold_after = 2
    answers: list[str] = []

    async def ask(url: str) -> None:
        async with httpx.AsyncClient() as client:
            response = await client.post(
                f"{url}/v1/completions", json={"prompt": "hi", "stream": True, "max_tokens": 100}
            )
            answers.append(response.text)

    async with trio.open_nursery() as nursery:
        running = await start(nursery, engine)
        nursery.start_soon(ask, running.url)
        await engine.held.wait()
        async with connected(running.url):  # an idle connection does not hold up the stop
            running.scope.cancel()
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(OSError, match="connect"):
                await trio.open_tcp_stream(*_address(running.url))
            engine.release.set()
            with trio.fail_after(60):
                await running.ended.wait()
    assert answers[0].endswith("data: [DONE]\n\n")


async def test_the_stop_deadline_ends_what_does_not_finish(engine: FakeEngine) -> None:
    engine.hold_after = 2
    async with trio.open_nursery() as nursery:
        running = await start(nursery, engine, deadline=trio.current_time() + 0.2)
        async with connected(running.url) as connection:
            await connection.send_all(request(prompt="hi", stream=True))
            await engine.held.wait()
            with trio.fail_after(60):
                running.scope.cancel()
                await running.ended.wait()
    assert engine.aborted == 1


class RunningServer:
    """A server that can be stopped, and waited for."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.url = ""


async def start(
    nursery: trio.Nursery, engine: FakeEngine, deadline: float | None = None, **options: Any
) -> RunningServer:
    """Serve in a nursery, as a supervised child with a stop deadline would."""
    running, config = RunningServer(), ServerConfig(port=0, **options)

    async def run(*, task_status: trio.TaskStatus[list[str]]) -> None:
        with Lifetime("http").running() as lifetime, running.scope:
            if deadline is not None:
                lifetime.tighten(deadline)
            await serve_http(engine, config, sockets=[bind(config)], task_status=task_status)
        running.ended.set()

    (running.url,) = await nursery.start(run)
    return running


def _address(url: str) -> tuple[str, int]:
    host, port = url.partition("://")[2].split(":")
    return host, int(port)


async def test_no_socket_stays_open(engine: FakeEngine) -> None:
    async with serving(engine) as url:
        host, port = _address(url)
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream(host, port)


async def test_a_server_that_failed_can_be_started_again(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port stays bound in between."""
    config = ServerConfig(port=0)
    sockets = [bind(config)]
    crash = trio.Event()
    original = Listener.serve

    async def crashing(*args: Any, **kwargs: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(original, *args, **kwargs))
            await crash.wait()
            raise RuntimeError("crashed")

    monkeypatch.setattr(Listener, "serve", crashing)
    with pytest.RaisesGroup(pytest.RaisesGroup(RuntimeError, flatten_subgroups=True)):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(partial(serve_http, engine, config, sockets=sockets))
            crash.set()
    monkeypatch.setattr(Listener, "serve", original)
    async with trio.open_nursery() as nursery:
        assert await nursery.start(partial(serve_http, engine, config, sockets=sockets)) == address
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{address[0]}/live")).status_code == 200
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("options", "warnings"),
    [
        ({"host": "0.0.0.0"}, 1),
        ({"host": ""}, 1),
        ({"host": "0.0.0.0", "api_key": "k"}, 0),
        ({"host": "127.0.0.1"}, 0),
        ({"host": "localhost"}, 0),
    ],
)
def test_an_open_server_without_a_key_is_warned_about(
    options: dict[str, Any], warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = ServerConfig(port=0, **options)
    with bind(config) as sock:
        warn_if_open(config, sock)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warnings


@pytest.mark.parametrize(("host", "warnings"), [("::", 1), ("::1", 0), ("fe80::1%eth0", 1)])
def test_so_it_is_over_ipv6(host: str, warnings: int, caplog: pytest.LogCaptureFixture) -> None:
    class Listening:
        def getsockname(self) -> tuple[str, int, int, int]:
            return host, 8000, 0, 0

    warn_if_open(ServerConfig(host=host), cast(socket.socket, Listening()))
    assert len(caplog.records) == warnings
