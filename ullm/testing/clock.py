"""Virtual time: what waits ten minutes takes none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio
from trio.testing import MockClock

T = TypeVar("T")

THREAD_SECONDS = 0.02
"""Real seconds of idleness before the clock jumps: encoding a prompt hops through a thread, which the
clock takes for idleness."""


def virtual_clock(threshold: float = THREAD_SECONDS) -> MockClock:
    """Return a clock that jumps to the next deadline as soon as nothing else is left to do.

    Args:
        threshold: real seconds of idleness before it does; 0 where no threads are used.
    """
    return MockClock(autojump_threshold=threshold)


def run_virtually(function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Call `trio.run` on a virtual clock, for tests that are not run by a trio plugin."""
    return trio.run(function, *arguments, clock=virtual_clock())
