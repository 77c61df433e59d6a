"""Waiting for what sends no event."""

from __future__ import annotations

import time
from collections.abc import Callable

POLL = 0.01
SECONDS = 60.0
"""How long to wait before a test fails: what takes a second here takes ten on a slow, busy machine."""


def eventually(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait until a condition is true, such as another process's end.

    Raises:
        AssertionError: it is not within `seconds` seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        time.sleep(POLL)
