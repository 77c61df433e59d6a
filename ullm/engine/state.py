"""The states of an engine, which only go forward."""

from __future__ import annotations

from ullm.supervision import ForwardState


class EngineState(ForwardState):
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
