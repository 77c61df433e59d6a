"""Pacing: the more streams there are, the less often each of them is written to.

An event costs a front end about as much whether it carries one token or ten, so a server with many
streams writes to each less often, and with more tokens. Few streams get every token as it comes; the first
token of a stream, and its end, never wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

UNPACED_STREAMS = 32
"""Up to this many streams get every token at once."""
EVENTS_PER_SECOND = 6000
"""Events that all streams together get beyond that; a quarter of what a front end can write."""


def unhurried() -> float:
    """Return the pace of an answer that is not streamed: everything at its end."""
    return math.inf


class Pacer:
    """Counts the streams and sets their pace."""

    def __init__(self) -> None:
        self.streams = 0

    def interval(self) -> float:
        """Return the seconds between two events of one stream."""
        return max(0, self.streams - UNPACED_STREAMS) / EVENTS_PER_SECOND

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count one stream more within this block."""
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1
