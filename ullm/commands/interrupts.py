"""Ctrl-C and SIGTERM for commands that run trio: cancellation and an exit status, no traceback."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import trio

FORCED = 128
"""Added to a signal's number for the exit status, as shells do."""


def run_interruptibly(work: Callable[[], Awaitable[int]]) -> int:
    """``trio.run(work)``; SIGINT or SIGTERM cancels it, and the status is 128 + the signal's number."""

    async def main() -> int:
        status = 0
        async with trio.open_nursery() as nursery:

            async def watch(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
                nonlocal status
                with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    task_status.started()
                    async for number in signals:
                        status = FORCED + number
                        nursery.cancel_scope.cancel()

            await nursery.start(watch)
            status = await work()
            nursery.cancel_scope.cancel()
        return status

    return trio.run(main)
