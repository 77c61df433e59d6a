"""How long the event loop is held at a time: what any one request does to all others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

LONG_SECONDS = 0.1
"""Holds that are counted: nothing that a client sends is to cause one."""


class LoopHolds(trio.abc.Instrument):
    """Measures the time between two looks of an event loop at its I/O, in which it runs tasks.

    Attributes:
        longest: the longest such time so far, in seconds.
        long: number of those above `LONG_SECONDS`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.longest = 0.0
        self.long = 0
        self._clock = clock
        self._since: float | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the current event loop within this context."""
        trio.lowlevel.add_instrument(self)
        try:
            yield
        finally:
            trio.lowlevel.remove_instrument(self)
            self._since = None

    def after_io_wait(self, timeout: float) -> None:
        """Note that tasks will run now."""
        self._since = self._clock()

    def before_io_wait(self, timeout: float) -> None:
        """Note that all tasks that could run have run."""
        if self._since is None:
            return
        seconds = self._clock() - self._since
        if seconds > self.longest:
            self.longest = seconds
        self.long += seconds > LONG_SECONDS
