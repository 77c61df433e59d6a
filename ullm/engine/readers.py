"""Readers of requests: how many there are, and how one is woken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Readers:
    """Counts the readers of admitted requests; a stop waits until they have taken everything."""

    def __init__(self) -> None:
        self._count = 0
        self._none = trio.Event()

    def enter(self) -> None:
        """Count one more."""
        if not self._count:
            self._none = trio.Event()
        self._count += 1

    def leave(self) -> None:
        """Count one less."""
        self._count -= 1
        if not self._count:
            self._none.set()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Count one more within this block."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    async def wait_none(self) -> None:
        """Wait until all have left."""
        while self._count:
            await self._none.wait()


class WakeUpCall:
    """Wakes the reader of one request: owned by the reader, called by the router.

    It refers to nothing, so a record that keeps it does not keep the reader alive.

    Attributes:
        quiet_until: before this time, in trio's, new tokens wake nobody; the end of a choice always does.
    """

    def __init__(self) -> None:
        self.quiet_until = 0.0
        self._event: trio.Event | None = None

    def notify(self, time: float) -> None:
        """Note a change at this time; see `RequestRecord.notify`."""
        if self._event is not None and time >= self.quiet_until:
            self._event.set()

    async def wait(self, deadline: float) -> bool:
        """Wait for a change; return False if none comes before the deadline."""
        self._event = trio.Event()
        with trio.CancelScope(deadline=deadline) as scope:
            await self._event.wait()
        self._event = None
        return not scope.cancelled_caught
