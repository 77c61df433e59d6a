"""The end of a drain: whoever has connected is answered, whoever comes later refused, nobody reset."""

from __future__ import annotations

import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
import trio.testing
from fake_engine import FakeEngine
from test_connection import RunningServer, connected, read_until, request, start

from ullm.config import ServerConfig
from ullm.server import open_sockets
from ullm.server.http import listener as listener_module
from ullm.server.http.last_connections import take_last

pytestmark = pytest.mark.process

LIVE = request("GET", "/live")


@pytest.fixture(
    params=["tcp", pytest.param("unix", marks=pytest.mark.skipif(sys.platform == "win32", reason="no"))]
)
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    config = ServerConfig(port=0) if request.param == "tcp" else ServerConfig(uds=str(tmp_path / "sock"))
    with open_sockets(config) as (sock,):
        yield sock


def test_those_who_wait_are_taken_and_others_are_not(listening: socket.socket) -> None:
    address = listening.getsockname()
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.socket(listening.family)) for _ in range(20)]
        for client in clients:
            client.connect(address)
            client.sendall(b"hello")
        late = stack.enter_context(socket.socket(listening.family))
        late.setblocking(False)
        taken = [stack.enter_context(sock) for sock in take_last(listening)]
        in_progress = late.connect_ex(address)
        assert in_progress != 0  # refused at once, or when it tries again
        listening.close()
        for sock in taken:
            sock.setblocking(True)
            assert sock.recv(10) == b"hello"
            sock.sendall(b"bye")
        assert [client.recv(10) for client in clients] == [b"bye"] * 20
        if in_progress not in (0, 111):
            late.setblocking(True)
            with pytest.raises(ConnectionRefusedError):
                late.connect(address)


async def test_connections_in_the_queue_are_answered_at_a_stop(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They came while no turn of the event loop was left to accept them."""

    async def accept_nobody(self: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(listener_module.SlotListener, "accept", accept_nobody)
    async with trio.open_nursery() as nursery:
        running: RunningServer = await start(nursery, engine)
        answers: Counter[bytes] = Counter()

        async def ask() -> None:
            async with connected(running.url) as connection:
                await connection.send_all(LIVE)
                answer = b"".join([data async for data in connection])
            assert b"connection: close" in answer.lower()
            answers[answer.splitlines()[0].strip()] += 1

        async with trio.open_nursery() as clients:
            for _ in range(30):
                clients.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.05)
            running.scope.cancel()
        assert answers == {b"HTTP/1.1 200": 30}
        with trio.fail_after(60):
            await running.ended.wait()


async def test_a_request_on_its_way_to_an_idle_connection_is_answered(engine: FakeEngine) -> None:
    async with trio.open_nursery() as nursery:
        running = await start(nursery, engine)
        async with connected(running.url) as new, connected(running.url) as kept:
            await kept.send_all(LIVE)
            assert b"close" not in await read_until(kept, b"}")
            await trio.testing.wait_all_tasks_blocked(0.01)
            running.scope.cancel()
            await trio.testing.wait_all_tasks_blocked(0.01)
            for connection in (new, kept):
                await connection.send_all(LIVE)
            for connection in (new, kept):
                answer = b"".join([data async for data in connection])
                assert b" 200 " in answer.splitlines()[0]
                assert b"connection: close" in answer.lower()
        with trio.fail_after(60):
            await running.ended.wait()


@pytest.mark.parametrize("kept", [False, True])
async def test_clients_that_hammer_are_answered_or_refused(engine: FakeEngine, kept: bool) -> None:
    """Each asks on one connection after another, or on each for as long as it may, until it is refused."""
    results: Counter[str] = Counter()
    many = trio.Event()
    async with trio.open_nursery() as nursery:
        running = await start(nursery, engine)
        address = ("127.0.0.1", int(running.url.rpartition(":")[2]))

        async def hammer() -> None:
            while True:
                sock = trio.socket.socket()
                try:
                    await sock.connect(address)
                except ConnectionRefusedError:
                    results["refused"] += 1
                    sock.close()
                    return
                async with trio.SocketStream(sock) as stream:
                    while await ask(stream) and kept:
                        pass

        async def ask(stream: trio.SocketStream) -> bool:
            """Ask once; return whether the connection may be used again."""
            try:
                await stream.send_all(LIVE)
                answer = b""
                while not answer.endswith(b"}") and (more := await stream.receive_some()):
                    answer += more
            except trio.BrokenResourceError:
                results["reset"] += 1
                return False
            results["answered" if answer.endswith(b"}") else "dropped"] += 1
            if results["answered"] == 200:
                many.set()
            return b"connection: close" not in answer.lower()

        async with trio.open_nursery() as clients:
            for _ in range(20):
                clients.start_soon(hammer)
            await many.wait()
            running.scope.cancel()
        with trio.fail_after(60):
            await running.ended.wait()
    assert results == {"answered": results["answered"], "refused": 20}
