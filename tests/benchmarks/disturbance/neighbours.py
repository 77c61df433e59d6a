"""Busy neighbours: processes that do nothing but spin."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio

T = TypeVar("T")
SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10_000_000):
        pass
"""
"""Looks up now and then whether whoever started it is still there, so that none is left behind."""


@asynccontextmanager
async def busy_neighbours(count: int) -> AsyncIterator[list[int]]:
    """Run spinning processes during the block; yield their pids.

    Each leads a session, as another user's program would: Linux may schedule sessions as groups, see
    sched(7).
    """
    processes: list[trio.Process] = []
    try:
        for _ in range(count):
            command = [sys.executable, "-S", "-E", "-c", SPIN]
            options: dict[str, Any] = {"start_new_session": os.name == "posix"}
            processes.append(await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, **options))
        yield [process.pid for process in processes]
    finally:
        with trio.CancelScope(shield=True):
            for process in processes:
                process.kill()
                await process.wait()


async def beside(count: int, work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Run ``await work(*arguments)`` beside spinning processes."""
    async with busy_neighbours(count):
        return await work(*arguments)
