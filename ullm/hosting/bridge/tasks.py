"""The function that runs in the trio thread for each kind of call; each fills a channel."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import trio

from ullm.errors import EngineStopped
from ullm.hosting.bridge.channel import Channel

T = TypeVar("T")


def without_cancelled(error: BaseException) -> BaseException:
    """Return the error as another loop may see it: without this loop's own cancellations."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    return error.split(trio.Cancelled)[1] or EngineStopped()


async def call(async_fn: Callable[..., Awaitable[T]], args: tuple[Any, ...], channel: Channel[T]) -> None:
    """Put the result of ``async_fn(*args)``."""
    channel.put(await async_fn(*args))


async def push(
    async_fn: Callable[[Callable[[T], Awaitable[None]]], Awaitable[object]], channel: Channel[T]
) -> None:
    """Put everything that ``async_fn`` sends."""
    await async_fn(channel.send)


async def iterate(
    open_stream: Callable[[], AbstractAsyncContextManager[AsyncIterable[T]]], channel: Channel[T]
) -> None:
    """Put everything that the stream yields."""
    async with open_stream() as items:
        async for item in items:
            await channel.send(item)


class _TaskStatus:
    def __init__(self, channel: Channel[Any]) -> None:
        self._channel = channel

    def started(self, value: Any = None) -> None:
        self._channel.put(value)


async def start(
    async_fn: Callable[..., Awaitable[object]], args: tuple[Any, ...], channel: Channel[Any]
) -> None:
    """Run a task, and put the value with which it calls ``task_status.started()``."""
    await async_fn(*args, task_status=_TaskStatus(channel))
