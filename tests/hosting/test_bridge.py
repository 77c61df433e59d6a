"""The background trio loop, used from asyncio, from another trio loop, and from no loop."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
import trio.testing

from ullm.errors import EngineDead
from ullm.hosting.bridge import Stream, TrioThread


@pytest.fixture
def thread() -> Iterator[TrioThread]:
    thread = TrioThread().start()
    yield thread
    assert thread.stop(timeout=60)


class Source:
    """Yields ``count`` numbers; tells how far it got and how it ended."""

    def __init__(self, count: int, then: BaseException | None = None, hold: bool = False) -> None:
        self.count, self.then, self.hold = count, then, hold
        self.produced = 0
        self.ended = threading.Event()

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[AsyncIterator[int]]:
        try:
            yield self._items()
        finally:
            self.ended.set()

    async def _items(self) -> AsyncIterator[int]:
        for number in range(self.count):
            await trio.lowlevel.checkpoint()
            self.produced += 1
            yield number
        if self.then is not None:
            raise self.then
        if self.hold:
            await trio.sleep_forever()


async def double(number: int) -> int:
    await trio.lowlevel.checkpoint()
    return 2 * number


async def fail() -> None:
    raise ValueError("from inside")


class Sleeper:
    def __init__(self) -> None:
        self.began = threading.Event()
        self.cancelled = threading.Event()

    async def __call__(self) -> None:
        self.began.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()


# --- calls -------------------------------------------------------------------------------------


def test_call_blocks_for_the_result(thread: TrioThread) -> None:
    assert thread.call(double, 21) == 42
    with pytest.raises(ValueError, match="from inside"):
        thread.call(fail)


def test_call_from_asyncio(thread: TrioThread) -> None:
    async def main() -> list[int]:
        return list(await asyncio.gather(*(thread.call_async(double, number) for number in range(50))))

    assert asyncio.run(main()) == [2 * number for number in range(50)]


async def test_call_from_another_trio_loop(thread: TrioThread) -> None:
    assert await thread.call_async(double, 21) == 42
    with pytest.raises(ValueError, match="from inside"):
        await thread.call_async(fail)


def test_call_timeout_cancels_the_work(thread: TrioThread) -> None:
    sleeper = Sleeper()
    with pytest.raises(TimeoutError):
        thread.call(sleeper, timeout=0.01)
    assert sleeper.cancelled.wait(60)


def test_asyncio_cancellation_reaches_the_work_and_waits_for_it(thread: TrioThread) -> None:
    sleeper = Sleeper()

    async def main() -> None:
        task = asyncio.create_task(thread.call_async(sleeper))
        await asyncio.to_thread(sleeper.began.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sleeper.cancelled.is_set()

    asyncio.run(main())


async def test_trio_cancellation_reaches_the_work_and_waits_for_it(thread: TrioThread) -> None:
    sleeper = Sleeper()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(thread.call_async, sleeper)
            await trio.to_thread.run_sync(sleeper.began.wait, 5)
            scope.cancel()
    assert scope.cancelled_caught
    assert sleeper.cancelled.is_set()


def test_call_from_its_own_thread_is_refused(thread: TrioThread) -> None:
    async def inside() -> None:
        thread.call(double, 1)

    with pytest.raises(RuntimeError, match="own thread"):
        thread.call(inside)


# --- background tasks --------------------------------------------------------------------------


async def serve(value: str, stop: trio.Event | None = None, *, task_status: Any) -> None:
    task_status.started(value)
    await trio.sleep_forever()


def test_start_task_hands_out_the_started_value(thread: TrioThread) -> None:
    job = thread.start_task(serve, "ready")
    assert job.value == "ready"
    assert job.wait(timeout=0.01) is False
    job.cancel()
    with pytest.raises(EngineDead, match="cancelled"):
        job.wait(timeout=60)


def test_start_task_raises_what_failed_before_it_started(thread: TrioThread) -> None:
    async def broken(*, task_status: Any) -> None:
        raise ValueError("no start")

    async def silent(*, task_status: Any) -> None:
        pass

    with pytest.raises(ValueError, match="no start"):
        thread.start_task(broken)
    with pytest.raises(RuntimeError, match="without calling"):
        thread.start_task(silent)


def test_start_task_from_asyncio(thread: TrioThread) -> None:
    async def main() -> None:
        job = await thread.start_task_async(serve, "ready")
        assert job.value == "ready"
        waits = [asyncio.create_task(job.wait_async()) for _ in range(2)]
        job.cancel()
        for wait in waits:
            with pytest.raises(EngineDead):
                await wait

    asyncio.run(main())


# --- streams -----------------------------------------------------------------------------------


def test_stream_without_a_loop(thread: TrioThread) -> None:
    assert list(thread.stream(Source(1000))) == list(range(1000))


def test_stream_in_asyncio(thread: TrioThread) -> None:
    async def one() -> list[int]:
        return [item async for item in thread.stream(Source(500))]

    async def main() -> list[list[int]]:
        return list(await asyncio.gather(*(one() for _ in range(20))))

    assert asyncio.run(main()) == [list(range(500))] * 20


async def test_stream_in_another_trio_loop(thread: TrioThread) -> None:
    assert [item async for item in thread.stream(Source(500))] == list(range(500))


def test_pipe(thread: TrioThread) -> None:
    async def produce(send: Any) -> None:
        for number in range(1000):
            await send(number)

    assert list(thread.pipe(produce)) == list(range(1000))


def test_stream_error_comes_after_the_items(thread: TrioThread) -> None:
    stream = thread.stream(Source(3, then=ValueError("broken")))
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(stream)


def test_stream_producer_waits_for_a_slow_consumer(thread: TrioThread) -> None:
    source = Source(100_000)
    stream = thread.stream(source)
    assert next(stream) == 0
    thread.call(trio.testing.wait_all_tasks_blocked)
    assert source.produced < 2000
    assert list(stream)[-1] == 99_999


def test_dropping_a_stream_cancels_it_by_refcount(thread: TrioThread) -> None:
    source = Source(1, hold=True)
    gc.disable()
    try:
        for _ in thread.stream(source):
            break
        assert source.ended.wait(60)
    finally:
        gc.enable()


def test_break_in_asyncio_cancels_it_by_refcount(thread: TrioThread) -> None:
    source = Source(1, hold=True)

    async def main() -> None:
        async for _ in thread.stream(source):
            break
        assert await asyncio.to_thread(source.ended.wait, 5)

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


def test_a_wait_with_a_time_limit_loses_nothing(thread: TrioThread) -> None:
    """The next wait goes on, and those before leave nothing behind."""
    gate = thread.call(_make_event)

    @asynccontextmanager
    async def late() -> AsyncIterator[AsyncIterator[int]]:
        async def items() -> AsyncIterator[int]:
            await gate.wait()
            for number in range(3):
                yield number

        yield items()

    async def main() -> None:
        stream: Stream[int] = thread.stream(late)
        for _ in range(10):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(stream), 0.001)
        assert stream._channel._waiting == []
        thread.post(gate.set)
        assert [item async for item in stream] == [0, 1, 2]

    asyncio.run(main())


def test_a_cancelled_task_cancels_the_stream_that_it_reads(thread: TrioThread) -> None:
    source = Source(0, hold=True)

    async def read() -> None:
        async for _ in thread.stream(source):
            raise AssertionError("there are no items")

    async def main() -> None:
        task = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(source.ended.wait, 5)

    asyncio.run(main())


def test_a_closed_stream_has_no_more_items(thread: TrioThread) -> None:
    async def main() -> None:
        stream = thread.stream(Source(5, hold=True))
        assert await anext(stream) == 0
        await stream.aclose()
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        assert await stream.next_batch() == []

    asyncio.run(main())
    with thread.stream(Source(5, hold=True)) as stream:
        assert next(stream) == 0
    assert list(stream) == []


def test_close_waits_for_the_end(thread: TrioThread) -> None:
    source = Source(1, hold=True)
    with thread.stream(source) as stream:
        assert next(stream) == 0
    assert source.ended.is_set()


async def test_aclose_waits_for_the_end_even_when_cancelled(thread: TrioThread) -> None:
    source = Source(1, hold=True)
    with trio.CancelScope() as scope:
        async with thread.stream(source) as stream:
            assert await anext(stream) == 0
            scope.cancel()
    assert source.ended.is_set()


def test_one_wake_up_for_all_that_is_ready(thread: TrioThread) -> None:
    """Many streams that get an item in the same step cost few ``call_soon_threadsafe``."""
    gate = thread.call(_make_event)

    @asynccontextmanager
    async def gated() -> AsyncIterator[AsyncIterator[int]]:
        async def items() -> AsyncIterator[int]:
            await gate.wait()
            yield 1

        yield items()

    async def main() -> int:
        loop = asyncio.get_running_loop()
        streams = [thread.stream(gated) for _ in range(200)]
        waits = [asyncio.create_task(anext(stream)) for stream in streams]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await thread.call_async(trio.testing.wait_all_tasks_blocked)
        wake_ups = 0
        original = loop.call_soon_threadsafe

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal wake_ups
            wake_ups += 1
            return original(*args, **kwargs)

        streams[0]._current_loop()._schedule = counting
        thread.post(gate.set)
        assert await asyncio.gather(*waits) == [1] * 200
        return wake_ups

    assert asyncio.run(main()) <= 3  # the gate's turn, the turn that its tasks run in


async def _make_event() -> trio.Event:
    return trio.Event()


def test_the_loop_outlives_a_dead_asyncio_loop(thread: TrioThread) -> None:
    source = Source(0, hold=True)
    loop = asyncio.new_event_loop()
    gate = thread.call(_make_event)

    @asynccontextmanager
    async def gated() -> AsyncIterator[AsyncIterator[int]]:
        async with source() as items:

            async def gated_items() -> AsyncIterator[int]:
                await gate.wait()
                yield 1
                async for item in items:
                    yield item

            yield gated_items()

    task = loop.create_task(_first(thread.stream(gated)))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    thread.post(gate.set)
    assert source.ended.wait(60)
    assert thread.call(double, 2) == 4
    task._log_destroy_pending = False  # type: ignore[attr-defined]


async def _first(stream: Stream[int]) -> int:
    return await anext(stream)


# --- the end -----------------------------------------------------------------------------------


def test_stop_fails_what_is_running_and_what_comes_later() -> None:
    thread = TrioThread().start()
    source = Source(1, hold=True)
    stream = thread.stream(source)
    assert next(stream) == 0
    job = thread.start_task(serve, "ready")
    assert thread.alive
    assert thread.stop(timeout=60)
    assert not thread.alive
    with pytest.raises(EngineDead):
        next(stream)
    with pytest.raises(EngineDead):
        job.wait()
    with pytest.raises(EngineDead, match="stopped"):
        thread.call(double, 1)
    with pytest.raises(EngineDead):
        thread.stream(source)
    assert thread.stop(timeout=60)


async def test_stop_from_trio_wakes_a_pending_call() -> None:
    thread = TrioThread().start()
    sleeper = Sleeper()

    async def call() -> None:
        with pytest.raises(EngineDead):
            await thread.call_async(sleeper)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.to_thread.run_sync(sleeper.began.wait, 5)
        assert await thread.stop_async(5)


def test_stop_gives_up_on_what_ignores_its_cancellation() -> None:
    thread = TrioThread().start()
    release = thread.call(_make_event)

    async def stubborn(*, task_status: Any) -> None:
        task_status.started()
        with trio.CancelScope(shield=True):
            await release.wait()

    thread.start_task(stubborn)
    assert thread.stop(timeout=0.05) is False
    thread.post(release.set)
    assert thread.stop(timeout=60) is True


def test_never_started() -> None:
    with pytest.raises(EngineDead, match="never started"):
        TrioThread().call(double, 1)


def test_threads_race_with_the_end() -> None:
    """Whatever the moment of the stop, each of many callers gets an answer or EngineDead."""
    for _ in range(20):
        thread = TrioThread().start()
        answers: list[object] = []

        def caller(thread: TrioThread = thread, answers: list[object] = answers) -> None:
            for number in range(100):
                try:
                    answers.append(thread.call(double, number))
                except EngineDead as error:
                    answers.append(error)

        callers = [threading.Thread(target=caller) for _ in range(4)]
        for each in callers:
            each.start()
        assert thread.stop(timeout=60)
        for each in callers:
            each.join(60)
            assert not each.is_alive()
        assert len(answers) == 400
