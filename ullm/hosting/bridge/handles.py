"""Handles for callers in other loops: a background task, a stream of items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from ullm.hosting.bridge.channel import Channel, ConsumerLoop

T = TypeVar("T")


class BackgroundTask:
    """A background task in a `TrioThread`; dropping the object does not end the task.

    Attributes:
        value: the argument of the task's ``task_status.started()``.
    """

    value: Any

    def __init__(self, current_loop: Callable[[], ConsumerLoop], channel: Channel[Any]) -> None:
        self._current_loop = current_loop
        self.channel = channel

    def cancel(self) -> None:
        """Cancel the task; returns at once."""
        self.channel.cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the task has ended, and raise its error; return False after ``timeout`` seconds."""
        if not self.channel.block(until_end=True, timeout=timeout):
            return False
        self.channel.check()
        return True

    async def wait_async(self) -> None:
        """Wait until the task has ended, and raise its error."""
        await self.channel.wait(self._current_loop(), until_end=True)
        self.channel.check()

    def take_started(self) -> BackgroundTask:
        """Set `value`, or raise the error that kept the task from starting."""
        values = self.channel.take()
        if not values:
            self.channel.check()
            raise RuntimeError("the task ended without calling task_status.started()")
        self.value = values[0]
        return self


class Stream(Generic[T]):
    """The items that a task in a `TrioThread` yields, for one consumer in asyncio, in trio, or in no loop.

    Iterate with ``async for`` or ``for``. After the last item the task's error is raised, if there was one,
    and `EngineDead` when the loop stops. The task is cancelled when the stream is closed, or when nobody
    refers to the stream any more. A wait for an item that is cancelled, by a time limit maybe, loses nothing:
    the next one goes on. A closed stream has no more items.
    """

    def __init__(self, current_loop: Callable[[], ConsumerLoop], channel: Channel[T]) -> None:
        self._current_loop = current_loop
        self._channel = channel
        self._ready: deque[T] = deque()
        self._closed = False

    def __del__(self) -> None:
        self._channel.cancel()

    def __aiter__(self) -> Stream[T]:
        return self

    async def __anext__(self) -> T:
        if not self._ready:
            self._ready.extend(await self._take_async())
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    async def next_batch(self) -> list[T]:
        """Wait for at least one item and return all that have arrived; return an empty list at the end."""
        batch = list(self._ready) or await self._take_async()
        self._ready.clear()
        return batch

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._ready:
            self._ready.extend(self._take())
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    def cancel(self) -> None:
        """Cancel the task; returns at once."""
        self._channel.cancel()

    def close(self) -> None:
        """Cancel the task and block until it has ended."""
        self._close()
        self._channel.block(until_end=True)

    async def aclose(self) -> None:
        """Cancel the task and wait until it has ended."""
        self._close()
        loop = self._current_loop()
        with loop.shield():
            await self._channel.wait(loop, until_end=True)

    async def __aenter__(self) -> Stream[T]:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _close(self) -> None:
        self._closed = True
        self._ready.clear()
        self._channel.cancel()

    async def _take_async(self) -> list[T]:
        if not self._channel.ready and not self._closed:
            await self._channel.wait(self._current_loop(), until_end=False)
        return self._items()

    def _take(self) -> list[T]:
        if not self._closed:
            self._channel.block(until_end=False)
        return self._items()

    def _items(self) -> list[T]:
        if self._closed:
            return []
        items = self._channel.take()
        if not items:
            self._channel.check()
        return items
