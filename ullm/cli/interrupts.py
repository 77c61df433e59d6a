"""Ctrl-C and SIGTERM in commands that run trio: cancellation and an exit status, no traceback."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from ullm.errors import StartCancelled
from ullm.protocol.exit_codes import EXIT_SIGNAL_BASE

T = TypeVar("T")


class Interrupted(Exception):
    """Ctrl-C was typed, and there is neither an answer to stop nor a line to discard."""


def run_to_end(work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Run ``trio.run(work, *arguments)``; SIGINT or SIGTERM cancels it, so that no child process is left.

    Raises:
        SystemExit: a signal cancelled it; the status is 128 + the signal's number.
    """
    results: list[T] = []

    async def main() -> int:
        results.append(await work(*arguments))
        return 0

    status = run_interruptibly(main)
    if status:
        raise SystemExit(status)
    return results[0]


def run_interruptibly(work: Callable[[], Awaitable[int]]) -> int:
    """Run ``trio.run(work)``; return its status, or 128 + the number of the signal that cancelled it."""
    return trio.run(cancel_on_signal, work, lambda number: True)


async def cancel_on_signal(work: Callable[[], Awaitable[int]], fatal: Callable[[int], bool]) -> int:
    """Run ``work`` until it is done or a signal cancels it.

    Args:
        fatal: called with the number of each SIGINT and SIGTERM; returns False to continue.

    Returns:
        The result of ``work``, or 128 + the signal's number.
    """
    stopped_by = 0
    async with trio.open_nursery() as nursery:

        async def watch(task_status: trio.TaskStatus[None]) -> None:
            nonlocal stopped_by
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for number in signals:
                    if fatal(number):
                        stopped_by = stopped_by or number
                        nursery.cancel_scope.cancel()

        await nursery.start(watch)
        try:
            status = await work()
        except StartCancelled:
            if not stopped_by:
                raise
        nursery.cancel_scope.cancel()
    return EXIT_SIGNAL_BASE + stopped_by if stopped_by else status
