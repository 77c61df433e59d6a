"""The states of an engine, which only go forward, and a cell with one writer and many readers."""

from __future__ import annotations

import enum

import trio


class EngineState(enum.StrEnum):
    """STARTING → RUNNING → DRAINING → ABORTING → STOPPING → STOPPED; states may be skipped.

    FAILED ends the sequence from any state but STOPPED.
    """

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    ABORTING = "aborting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """Whether no other state follows."""
        return self in (EngineState.STOPPED, EngineState.FAILED)

    @property
    def is_stopping(self) -> bool:
        """Whether a stop was asked for, or is over, or the engine failed."""
        return self.reached(EngineState.DRAINING)

    def reached(self, state: EngineState) -> bool:
        """Whether this is ``state`` or comes after it. FAILED comes after every other state."""
        order = list(EngineState)
        return order.index(self) >= order.index(state)


def may_follow(old: EngineState, new: EngineState) -> bool:
    """Whether ``new`` may follow ``old``: forward only, and nothing after a final state."""
    return old is not new and not old.is_final and new.reached(old)


class StateReader:
    """What readers see of a `StateCell`."""

    def __init__(self, state: EngineState = EngineState.STARTING) -> None:
        self._history: list[tuple[EngineState, float]] = [(state, trio.current_time())]
        self._changed = trio.Event()

    @property
    def value(self) -> EngineState:
        """The present state."""
        return self._history[-1][0]

    @property
    def history(self) -> tuple[tuple[EngineState, float], ...]:
        """Each state so far with the trio time at which it began."""
        return tuple(self._history)

    async def wait_for(self, state: EngineState) -> EngineState:
        """Wait until ``state`` or one after it is reached; returns the present one.

        So a state that lasted too short to be seen is not missed, and a wait for RUNNING returns
        FAILED where the start fails.
        """
        while not self.value.reached(state):
            await self._changed.wait()
        return self.value

    async def changed(self, known: EngineState) -> EngineState:
        """Wait until the state is another one than ``known``; returns the present one."""
        while self.value is known:
            await self._changed.wait()
        return self.value


class StateCell(StateReader):
    """The one place where the state is written. Its owner keeps it; others get it as `StateReader`."""

    def set(self, state: EngineState) -> bool:
        """Go on to ``state``; False if it is the present one already.

        Raises:
            ValueError: ``state`` cannot follow the present one.
        """
        if state is self.value:
            return False
        if not may_follow(self.value, state):
            raise ValueError(f"{state.value} cannot follow {self.value.value}; states only go forward")
        self._history.append((state, trio.current_time()))
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        return True

    def advance(self, state: EngineState) -> bool:
        """Go on to ``state`` unless it or a later one is reached already; whether that changed anything."""
        return not self.value.reached(state) and self.set(state)
