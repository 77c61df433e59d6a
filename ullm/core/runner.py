"""What a worker runs: the one interface between the actors and the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ullm.messages import ModelInfo, Progress, Start, Step, StepResult


class PendingStep(Protocol):
    """A step that was submitted; on a GPU its kernels may still be running."""

    def done(self) -> bool:
        """Whether `result` would return at once."""

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled. Called once, in order of submission."""


class Runner(Protocol):
    """One rank of a model. Built without arguments; used from one thread; never from two at once."""

    def load(self, start: Start, progress: Callable[[Progress], None]) -> ModelInfo:
        """Load the weights, size the KV cache, warm up.

        Raises:
            ModelError: one line that names file and tensor, or device and bytes.
        """

    def submit(self, step: Step) -> PendingStep:
        """Start a step. At most two are pending at a time; tokens of the first feed the second."""

    def close(self) -> dict[str, float]:
        """Release graphs, KV cache, weights, process groups, device cache, in that order.

        Returns:
            Seconds per stage. Calling it again, or before `load`, does nothing.
        """
