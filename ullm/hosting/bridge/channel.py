"""Channels that carry results from a trio thread to consumers in other loops; see `ullm.hosting.bridge`."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import trio

T = TypeVar("T")
CAPACITY = 256
"""Items that a channel buffers before its producer waits for the consumer."""


class Settable(Protocol):
    """A trio or asyncio event."""

    def set(self) -> object:
        """Wake everybody who waits for it."""


class Channel(Generic[T]):
    """Items from one task in a trio thread to its consumer, and then the end.

    Args:
        post: has a function run in the trio thread, soon; does nothing once the thread has stopped.
    """

    def __init__(self, post: Callable[[Callable[[], object]], None]) -> None:
        self.scope = trio.CancelScope()
        self._post = post
        self._lock = threading.Lock()
        self._items: deque[T] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._waiting: list[tuple[Callable[[], None], bool]] = []
        self._room: trio.Event | None = None

    # --- called in the trio thread ---

    async def send(self, item: T) -> None:
        """Hand over one item, and wait while the consumer is `CAPACITY` items behind."""
        self.put(item)
        while len(self._items) >= CAPACITY:
            room = trio.Event()
            with self._lock:
                self._room = room if len(self._items) >= CAPACITY else None
            if self._room is not None:
                await room.wait()

    def put(self, item: T) -> None:
        """Hand over one item without waiting."""
        with self._lock:
            self._items.append(item)
            due = [wake for wake, at_end in self._waiting if not at_end]
            if due:
                self._waiting = [entry for entry in self._waiting if entry[1]]
        self._notify(due)

    def finish(self, error: BaseException | None) -> None:
        """Note the end, with the error that was raised, if any; only the first call counts."""
        with self._lock:
            if self._ended:
                return
            self._ended, self._error = True, error
            due = [wake for wake, _ in self._waiting]
            self._waiting.clear()
        self._notify(due)

    def _notify(self, due: list[Callable[[], None]]) -> None:
        for wake in due:
            wake()

    def forked(self, error: BaseException) -> None:
        """End with this error in a forked child, where no other thread holds a lock or waits."""
        self._lock = threading.Lock()
        self._ended, self._error = True, self._error or error

    # --- called by the consumer ---

    def cancel(self) -> None:
        """Cancel the task. Takes no lock, because garbage collection may call this anywhere."""
        if not self._ended:
            self._post(self.scope.cancel)

    @property
    def ready(self) -> bool:
        """Whether `take` would return something, or the end is reached."""
        return bool(self._items) or self._ended

    def take(self) -> list[T]:
        """Return all items that have arrived, and remove them."""
        with self._lock:
            items = list(self._items)
            self._items.clear()
            room, self._room = self._room, None
        if room is not None:
            self._post(room.set)
        return items

    def check(self) -> None:
        """Raise the task's error, if it ended with one."""
        if self._error is not None:
            raise self._error

    def result(self) -> T:
        """Return the only item, or raise the task's error."""
        self.check()
        return self.take()[0]

    def block(self, *, until_end: bool, timeout: float | None = None) -> bool:
        """Block until there is an item, or the end; return False after ``timeout`` seconds."""
        latch = threading.Event()
        if self._arm(latch.set, until_end):
            return latch.wait(timeout)
        return True

    async def wait(self, consumer: ConsumerLoop, *, until_end: bool) -> None:
        """Wait in the consumer's loop until there is an item, or the end."""
        event = consumer.event()
        wake = partial(consumer.post, event, self.cancel)
        if not self._arm(wake, until_end):
            return
        try:
            await event.wait()
        except BaseException:  # a consumer that waits with a time limit may do so any number of times
            with self._lock:
                self._waiting = [entry for entry in self._waiting if entry[0] is not wake]
            raise

    def _arm(self, wake: Callable[[], None], until_end: bool) -> bool:
        with self._lock:
            if self._ended or (self._items and not until_end):
                return False
            self._waiting.append((wake, until_end))
            return True


class ConsumerLoop:
    """The event loop of consumers; collects their wake-ups, so that many of them cost one.

    Args:
        schedule: has a function run in that loop, soon; raises RuntimeError when the loop is gone.
        flush_soon: has `flush` called at the end of the trio loop's current turn.
    """

    def __init__(
        self, schedule: Callable[[Callable[[], None]], object], flush_soon: Callable[[ConsumerLoop], None]
    ) -> None:
        self._schedule = schedule
        self._flush_soon = flush_soon
        self._lock = threading.Lock()
        self._pending: list[tuple[Settable, Callable[[], None]]] = []
        self._scheduled = False

    def event(self) -> Any:
        """Make an event of the loop's own kind."""
        raise NotImplementedError

    def shield(self) -> AbstractContextManager[object]:
        """Open a scope in which waiting goes on although the caller was cancelled."""
        raise NotImplementedError

    def post(self, event: Settable, on_lost: Callable[[], None]) -> None:
        """Have ``event`` set in the loop; call ``on_lost`` instead when the loop is gone."""
        with self._lock:
            self._pending.append((event, on_lost))
            first = len(self._pending) == 1
        if first:
            self._flush_soon(self)

    def flush(self) -> None:
        """Wake the loop, unless a wake-up is on its way already."""
        with self._lock:
            if self._scheduled or not self._pending:
                return
            self._scheduled = True
        try:
            self._schedule(self._drain)
        except RuntimeError:  # asyncio: the loop is closed; trio.RunFinishedError is one too
            self._lose()

    def _drain(self) -> None:
        for event, _ in self._take():
            event.set()

    def _lose(self) -> None:
        for _, on_lost in self._take():
            on_lost()

    def _take(self) -> list[tuple[Settable, Callable[[], None]]]:
        with self._lock:
            pending, self._pending = self._pending, []
            self._scheduled = False
        return pending


class AsyncioLoop(ConsumerLoop):
    """A running asyncio loop."""

    def __init__(self, loop: Any, flush_soon: Callable[[ConsumerLoop], None]) -> None:
        super().__init__(loop.call_soon_threadsafe, flush_soon)

    def event(self) -> Any:
        import asyncio

        return asyncio.Event()

    def shield(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()  # asyncio delivers a cancellation once


class TrioLoop(ConsumerLoop):
    """Another trio loop, by its token."""

    def __init__(self, token: Any, flush_soon: Callable[[ConsumerLoop], None]) -> None:
        super().__init__(token.run_sync_soon, flush_soon)

    def event(self) -> Any:
        return trio.Event()

    def shield(self) -> AbstractContextManager[object]:
        return trio.CancelScope(shield=True)
