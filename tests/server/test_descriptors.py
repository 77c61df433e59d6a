"""Silent connections end, give way to others, and leave descriptors for the rest of the program."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio

from ullm.server.http import connection_slots, hypercorn_connection
from ullm.server.http.descriptors import ENOUGH, RESERVE, connection_limit, raise_limit
from ullm.server.http.listener import Listener

pytestmark = pytest.mark.process

resource = pytest.importorskip("resource")
ROOM = 3
ASK = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nha"
Connect = Callable[[], Awaitable[trio.SocketStream]]


class Held:
    """An app that answers once it is released."""

    def __init__(self) -> None:
        self.release = trio.Event()
        self.called = trio.Event()
        self.asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        self.called.set()
        await self.release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok", "more_body": False})


class ReadsWhole(Held):
    """An app that reads the whole request first."""

    def __init__(self) -> None:
        super().__init__()
        self.release.set()
        self.waiting = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.waiting += 1
        while message := await receive():
            if message["type"] == "http.disconnect":
                return
            if not message["more_body"]:
                await super().__call__(scope, receive, send)
                return


@asynccontextmanager
async def served(app: Held) -> AsyncIterator[tuple[Listener, Connect]]:
    listener = Listener(app, stall_timeout=5, max_connections=ROOM)
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        await nursery.start(lambda task_status: listener.serve([sock], task_status=task_status))

        async def connect() -> trio.SocketStream:
            stream = await trio.open_tcp_stream("127.0.0.1", sock.getsockname()[1])
            return await stack.enter_async_context(stream)

        with trio.fail_after(60):
            yield listener, connect
        nursery.cancel_scope.cancel()


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        for _ in iter(holds, True):
            await trio.sleep(0.005)


async def answered(connection: trio.SocketStream) -> bool:
    answer = b""
    while not answer.endswith(b"ok"):
        more = await connection.receive_some()
        if not more:
            return False
        answer += more
    return True


async def has_ended(connection: trio.SocketStream) -> bool:
    try:
        return not await connection.receive_some()
    except trio.BrokenResourceError:  # something that it sent was not read
        return True


@pytest.mark.parametrize("sent", [b"", b"G", ASK[:-1]])
async def test_who_does_not_ask_is_not_kept(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(hypercorn_connection, "REQUEST_WITHIN", 0.2)
    async with served(Held()) as (listener, connect):
        connection = await connect()
        await connection.send_all(sent)
        assert await has_ended(connection)
        await until(lambda: listener.connections == 0)


async def test_a_client_that_has_asked_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent connection, which ends at the limit of new ones, tells when that limit has passed."""
    monkeypatch.setattr(hypercorn_connection, "REQUEST_WITHIN", 0.2)
    app = Held()
    async with served(app) as (_, connect):
        connection = await connect()
        await connection.send_all(ASK)
        await app.called.wait()
        assert await has_ended(await connect())
        app.release.set()
        assert await answered(connection)
        assert await has_ended(await connect())  # a kept connection has the longer time of idle ones
        await connection.send_all(ASK)
        assert await answered(connection)


async def test_the_silent_give_way_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection_slots, "UNDISTURBED", 0.05)
    app = Held()
    app.release.set()
    with caplog.at_level(logging.WARNING, "ullm"):
        async with served(app) as (listener, connect):
            silent = [await connect() for _ in range(ROOM)]
            await until(lambda: listener.connections == ROOM)
            for first in silent:
                asking = await connect()
                await asking.send_all(ASK)
                assert await answered(asking)
                assert await has_ended(first)
                assert listener.connections == ROOM
    assert caplog.text.count("as many connections as descriptors allow") == 1


async def test_half_a_body_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_slots, "UNDISTURBED", 0.05)
    app = ReadsWhole()
    async with served(app) as (listener, connect):
        halves = [await connect() for _ in range(ROOM)]
        for connection in halves:
            await connection.send_all(HALF)
        await until(lambda: app.waiting == ROOM)
        for first in halves:
            asking = await connect()
            await asking.send_all(HALF + b"lf")
            assert await answered(asking)
            assert await has_ended(first)
        assert listener.connections == ROOM


async def test_those_that_are_served_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_slots, "UNDISTURBED", 0.05)
    searches, searched = 0, trio.Event()
    free_a_slot = connection_slots.ConnectionSlots._free_a_slot

    def counting(self: connection_slots.ConnectionSlots) -> None:
        nonlocal searches
        free_a_slot(self)
        searches += 1
        if searches == 5:
            searched.set()

    monkeypatch.setattr(connection_slots.ConnectionSlots, "_free_a_slot", counting)
    app = Held()
    async with served(app) as (listener, connect):
        asking = [await connect() for _ in range(ROOM)]
        for connection in asking:
            await connection.send_all(ASK)
        await until(lambda: app.asked == ROOM)
        late = await connect()
        await late.send_all(ASK)
        await searched.wait()
        assert (listener.connections, app.asked) == (ROOM, ROOM)
        app.release.set()
        assert all([await answered(connection) for connection in asking])
        assert await answered(late)


@pytest.mark.parametrize(
    ("soft", "connections"),
    [(64, 32), (1024, 1024 - RESERVE), (20_000, 20_000 - RESERVE), (-1, ENOUGH - RESERVE)],
)
def test_a_reserve_is_left(monkeypatch: pytest.MonkeyPatch, soft: int, connections: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, -1))
    assert connection_limit() == connections


@pytest.mark.parametrize(
    ("soft", "hard", "becomes"),
    [(1024, 4096, 4096), (1024, -1, ENOUGH), (1024, 1 << 20, ENOUGH), (4096, 4096, None), (-1, -1, None)],
)
def test_the_soft_limit_is_raised(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, becomes: int | None
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    raise_limit()
    assert asked == ([] if becomes is None else [(becomes, hard)])


def test_a_system_that_allows_no_more_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_limit()
    assert connection_limit() == 128
