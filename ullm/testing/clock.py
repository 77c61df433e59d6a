"""Virtual time: what waits ten minutes takes none."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio
from trio.testing import MockClock

T = TypeVar("T")

HOP_SECONDS = 5.0
"""Real seconds for which the clock waits for work in a thread. Then it jumps all the same, so that time goes
on for those who watch over a thread that hangs."""

_RUN_SYNC = inspect.unwrap(trio.to_thread.run_sync).__code__


class _ThreadHops(trio.abc.Instrument):
    """Tells a clock when tasks wait for a thread, which it would take for idleness.

    Args:
        clock: does not jump while there are such tasks.
    """

    def __init__(self, clock: MockClock) -> None:
        self._clock = clock
        self._threshold = clock.autojump_threshold
        self._waiting: set[trio.lowlevel.Task] = set()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Take a task off the list; it comes back if it still waits."""
        if task in self._waiting:
            self._waiting.remove(task)
            if not self._waiting:
                self._clock.autojump_threshold = self._threshold

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Put a task that has gone into `trio.to_thread.run_sync` on the list."""
        if any(frame.f_code is _RUN_SYNC for frame, _ in task.iter_await_frames()):
            if not self._waiting:
                self._threshold = self._clock.autojump_threshold
                self._clock.autojump_threshold = max(self._threshold, HOP_SECONDS)
            self._waiting.add(task)


def virtual_clock(threshold: float = 0.0) -> MockClock:
    """Return a clock that jumps to the next deadline as soon as nothing else is left to do.

    Work in threads, by `trio.to_thread.run_sync`, counts as something to do: encoding a prompt is such work.

    Args:
        threshold: real seconds of idleness before it jumps; more than 0 where the work is done elsewhere, in
            another process or at the other end of a socket.
    """
    clock = MockClock(autojump_threshold=threshold)
    start = clock.start_clock

    def start_with_hops() -> None:
        start()
        trio.lowlevel.add_instrument(_ThreadHops(clock))

    vars(clock)["start_clock"] = start_with_hops  # MockClock allows no subclasses
    return clock


def run_virtually(function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Call `trio.run` on a virtual clock, for tests that are not run by a trio plugin."""
    return trio.run(function, *arguments, clock=virtual_clock())
