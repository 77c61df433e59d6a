"""Where an engine is in its life, and why it failed."""

from __future__ import annotations

from ullm.engine.state import EngineState
from ullm.errors import EngineDead, EngineDraining, EngineNotReady
from ullm.supervision import StateCell


class EngineLife:
    """The engine's state, which only goes forward, and the first cause of its failure.

    Attributes:
        cell: the state with its history.
        started: whether the engine has been `EngineState.RUNNING`.
        failure: the first cause, in one line; None while there is none.
    """

    def __init__(self) -> None:
        self.cell = StateCell(EngineState.STARTING)
        self.started = False
        self.failure: str | None = None

    @property
    def state(self) -> EngineState:
        """The present state."""
        return self.cell.value

    def run(self) -> None:
        """Enter `EngineState.RUNNING`."""
        self.cell.advance(EngineState.RUNNING)
        self.started = True

    def fail(self, cause: BaseException) -> None:
        """Remember the cause, unless there was one before."""
        self.failure = self.failure or str(cause) or type(cause).__name__

    def dead(self) -> EngineDead:
        """Return the error for everybody who waits for a failed engine."""
        return EngineDead(f"the engine has failed: {self.failure}")

    def check_running(self) -> None:
        """Return if the engine runs.

        Raises:
            EngineDead: it has failed.
            EngineNotReady: it is starting.
            EngineDraining: it is being stopped, or has been.
        """
        if self.failure is not None:
            raise self.dead()
        if self.state is EngineState.STARTING:
            raise EngineNotReady(self.state.value)
        if self.state is not EngineState.RUNNING:
            raise EngineDraining(self.state.value)
