"""Connection slots: no more at a time than leave descriptors for the rest of the program.

When all slots are taken, the connection that has owed a request, or the rest of one, for the longest time
gives way to a new one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import trio

from ullm.logs import get_logger

log = get_logger(__name__)

UNDISTURBED = 1.0
"""Seconds that a connection has for its next request although others wait for its slot."""


class SlotHolder(Protocol):
    """A connection that has a slot."""

    @property
    def waiting_since(self) -> float | None:
        """Trio time since which it owes a whole request; None while it has one, or is closed."""

    def give_way(self) -> None:
        """Close the connection."""

    def cut(self) -> None:
        """Close the connection at once, and forget what has not been sent."""


class ConnectionSlots:
    """Counts the connections of one listener and limits them.

    Args:
        limit: connections at a time; others wait in the kernel's queue until one of these ends.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._holders: set[SlotHolder] = set()
        self._one_ended = trio.Event()
        self._warned = False

    @property
    def occupied(self) -> int:
        """Number of connections that are being served."""
        return len(self._holders)

    @property
    def has_room(self) -> bool:
        """True if one more connection may be accepted."""
        return self._taken < self._limit

    async def wait_for_room(self, listening: trio.socket.SocketType) -> None:
        """Wait until one more connection may be accepted; make one give way that owes a request.

        Args:
            listening: the socket to accept from; nobody has to give way before a connection waits there.
        """
        while not self.has_room:
            await trio.lowlevel.wait_readable(listening)
            self._warn_once()
            self._one_ended = trio.Event()
            self._free_a_slot()
            with trio.move_on_after(UNDISTURBED):
                await self._one_ended.wait()
        self._warned = self._warned and self._taken > self._limit // 2

    def take(self) -> None:
        """Take a slot for a connection that was accepted; `occupy` gives it back."""
        self._taken += 1

    def give_back(self) -> None:
        """Give the slot back of a connection that is not served."""
        self._taken -= 1
        self._one_ended.set()

    @contextmanager
    def occupy(self, connection: SlotHolder) -> Iterator[None]:
        """Serve a connection within this block, on a slot that was taken for it."""
        self._holders.add(connection)
        try:
            yield
        finally:
            self._holders.discard(connection)
            self.give_back()

    def cut_all(self) -> None:
        """Cut every connection."""
        for connection in list(self._holders):
            connection.cut()

    def _free_a_slot(self) -> None:
        owing = [(each.waiting_since, each) for each in self._holders if each.waiting_since is not None]
        if not owing:
            return
        since, longest = min(owing, key=lambda pair: pair[0])
        if trio.current_time() - since >= UNDISTURBED:
            longest.give_way()

    def _warn_once(self) -> None:
        """Warn about full slots; not again until half of them are free."""
        if not self._warned:
            self._warned = True
            log.warning(
                "as many connections as descriptors allow; those without a request give way, others wait. "
                "Raise the limit of open files, as with ulimit -n",
                connections=self._limit,
            )
