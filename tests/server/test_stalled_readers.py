"""Clients that stop reading: they are cut, and others do not notice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from fake_engine import FakeEngine, serving
from test_connection import RunningServer, connected, read_until, request, start

pytestmark = pytest.mark.process

ENDLESS = 20_000
"""Tokens; some megabytes of events."""


@pytest.fixture
async def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.script = lambda index: [70] * ENDLESS
    return engine


@asynccontextmanager
async def stalled(url: str) -> AsyncIterator[trio.SocketStream]:
    """Start an endless stream, read its beginning, and stop reading."""
    async with connected(url, receive_buffer=4096) as connection:
        await connection.send_all(request(prompt="hi", stream=True, max_tokens=ENDLESS))
        await read_until(connection, b"data: ")
        yield connection


async def ends_with_a_reset(connection: trio.SocketStream) -> bool:
    """Read the bytes that were sent before the connection was cut."""
    try:
        while await connection.receive_some():
            pass
    except trio.BrokenResourceError:
        return True
    return False


async def read_whole_stream(url: str, tokens: int) -> None:
    async with connected(url) as connection:
        asked = request(headers="Connection: close\r\n", prompt="x", stream=True, max_tokens=tokens)
        await connection.send_all(asked)
        answer = b"".join([data async for data in connection])
        assert answer.count(b'"text":"') == tokens
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_a_stall_ends_the_request_and_the_connection(engine: FakeEngine) -> None:
    async with serving(engine, stall_timeout=0.3) as url, stalled(url) as connection:
        began = trio.current_time()
        for _ in range(5):
            await read_whole_stream(url, 50)  # others are not held up
        with trio.fail_after(60):
            await engine.all_gone.wait()
            assert engine.aborted == 1
            assert trio.current_time() - began > 0.25
            assert await ends_with_a_reset(connection)


async def test_little_is_produced_for_whom_does_not_read(engine: FakeEngine) -> None:
    """Neither the server nor the kernel accumulates unread events."""
    async with serving(engine, stall_timeout=60) as url, stalled(url):
        generation = next(iter(engine.active.values()))
        await trio.testing.wait_all_tasks_blocked(0.3)
        assert 0 < ENDLESS - len(generation._steps) < 500


async def test_a_slow_reader_is_no_stalled_one(engine: FakeEngine) -> None:
    """It reads rarely but steadily: every byte that gets through is progress."""
    engine.script = lambda index: [70] * 500
    async with serving(engine, stall_timeout=0.5) as url, connected(url, receive_buffer=4096) as connection:
        asked = request(headers="Connection: close\r\n", prompt="x", stream=True, max_tokens=500)
        await connection.send_all(asked)
        answer = b""
        while more := await connection.receive_some(8192):
            answer += more
            await trio.sleep(0.05)
    assert answer.count(b'"text":"') == 500
    assert engine.aborted == 0


async def test_a_stalled_reader_does_not_hold_up_the_stop(engine: FakeEngine) -> None:
    """Its connection is cut shortly before the deadline; others end as usual."""
    async with trio.open_nursery() as nursery:
        running: RunningServer = await start(nursery, engine, deadline=trio.current_time() + 1.5)
        async with stalled(running.url), connected(running.url) as other:
            engine.script = lambda index: [70] * 20
            engine.hold_after = 10
            await other.send_all(request(prompt="x", stream=True, max_tokens=20))
            await engine.held.wait()
            running.scope.cancel()
            await trio.sleep(0.05)
            engine.release.set()
            assert (await read_until(other, b"[DONE]")).count(b'"text":"') == 20
            with trio.fail_after(1.4):
                await running.ended.wait()
    assert engine.aborted == 1
    assert not engine.active


async def test_many_stalled_readers_do_not_hold_up_the_stop(engine: FakeEngine) -> None:
    async with trio.open_nursery() as nursery:
        running = await start(nursery, engine, deadline=trio.current_time() + 3)
        async with trio.open_nursery() as clients:

            async def stall(*, task_status: trio.TaskStatus[None]) -> None:
                async with stalled(running.url):
                    task_status.started()
                    await trio.sleep_forever()

            for _ in range(50):
                await clients.start(stall)
            running.scope.cancel()
            with trio.fail_after(3):
                await running.ended.wait()
            clients.cancel_scope.cancel()
    assert engine.aborted == 50
