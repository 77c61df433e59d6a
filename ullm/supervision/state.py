"""States that only go forward, in a cell with one writer and many readers."""

from __future__ import annotations

import enum
from typing import Generic, TypeVar

import trio


class ForwardState(enum.StrEnum):
    """Base for enumerations of states that only go forward, in the order in which they are declared.

    States may be skipped. Nothing follows a final state; that is the last one, unless a subclass has
    an `is_final` of its own.
    """

    @property
    def is_final(self) -> bool:
        """Whether no other state follows."""
        return self is list(type(self))[-1]

    def reached(self, state: ForwardState) -> bool:
        """Return whether this is ``state`` or comes after it."""
        order: list[ForwardState] = list(type(self))
        return order.index(self) >= order.index(state)

    def may_become(self, state: ForwardState) -> bool:
        """Return whether ``state`` may follow: it comes later, and this one is not final."""
        return self is not state and not self.is_final and state.reached(self)


S = TypeVar("S", bound=ForwardState)


class StateReader(Generic[S]):
    """A `StateCell` as its readers see it."""

    def __init__(self, state: S) -> None:
        self._history: list[tuple[S, float]] = [(state, trio.current_time())]
        self._changed = trio.Event()

    @property
    def value(self) -> S:
        """The present state."""
        return self._history[-1][0]

    @property
    def history(self) -> tuple[tuple[S, float], ...]:
        """Each state so far with the trio time at which it began."""
        return tuple(self._history)

    async def wait_for(self, state: S) -> S:
        """Wait until ``state`` or a later one is reached; return the present one.

        A state that is skipped, or over before anybody could see it, is not missed.
        """
        while not self.value.reached(state):
            await self._changed.wait()
        return self.value

    async def changed(self, known: S) -> S:
        """Wait until the state differs from ``known``; return the present one."""
        while self.value is known:
            await self._changed.wait()
        return self.value


class StateCell(StateReader[S]):
    """The one place where a state is written: its owner keeps it and hands it out as a `StateReader`.

    Args:
        state: the first one.
    """

    def set(self, state: S) -> bool:
        """Go on to ``state``; return False if it is the present one already.

        Raises:
            ValueError: ``state`` cannot follow the present one.
        """
        if state is self.value:
            return False
        if not self.value.may_become(state):
            raise ValueError(f"{state.value} cannot follow {self.value.value}; states only go forward")
        self._history.append((state, trio.current_time()))
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        return True

    def advance(self, state: S) -> bool:
        """Go on to ``state`` unless it or a later one is reached; return whether the state changed."""
        return not self.value.reached(state) and self.set(state)
