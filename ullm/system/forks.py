"""Forks of this process without another program, as by ``os.fork`` and multiprocessing's ``fork``.

The child has copies of all descriptors, but only the thread that forked. The pipes by which workers notice
the end of this process must not stay open in it, and whatever depends on another thread is of no use there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Forkable(Protocol):
    """Something that has to know when it finds itself in a forked child."""

    def forked(self) -> None:
        """Called in the child, before anything else runs there."""


class Forks:
    """What becomes of this process's copy; Python calls hooks for the process as a whole, and for good."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pipes: dict[int, tuple[int, int]] = {}
        self._forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()
        if hasattr(os, "register_at_fork"):  # Windows has no forks
            os.register_at_fork(
                before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._in_child
            )

    @contextmanager
    def held_off(self) -> Iterator[None]:
        """Hold forks off within this block, in which a pipe is made and `close_in_child` called."""
        with self._lock:
            yield

    def close_in_child(self, descriptor: int) -> None:
        """Have an end of a pipe closed in forked children, for as long as it is open here."""
        self._pipes[descriptor] = _identity(descriptor)

    def tell(self, forkable: Forkable) -> None:
        """Call its `forked` in forked children, for as long as it lives."""
        self._forkables.add(forkable)

    def _in_child(self) -> None:
        for descriptor, pipe in self._pipes.items():
            with contextlib.suppress(OSError):
                if _identity(descriptor) == pipe:  # else it was closed, and the number is another's
                    os.close(descriptor)
        self._pipes.clear()
        self._lock.release()
        for forkable in list(self._forkables):
            forkable.forked()


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


forks = Forks()
