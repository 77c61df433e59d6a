"""What a worker runs: the one interface between the actors and the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ullm.protocol.messages import ModelInfo, Prepare, Progress, Start, Step, StepResult


class PendingStep(Protocol):
    """A step that was submitted; on a GPU its kernels may still be running."""

    def done(self) -> bool:
        """Whether `result` would return at once."""

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled. Called once, in order of submission."""


class Runner(Protocol):
    """One rank of a model. Built without arguments; used from one thread; never from two at once."""

    def prepare(self, prepare: Prepare, progress: Callable[[Progress], None]) -> None:
        """In a standby worker: do what makes `load` fast and commits to nothing.

        It may take only what is shared with others, or small; no other rank is met, and no context on a
        device created. `load` may follow with other values, or never. A failure here is none: `load`
        says what is wrong.
        """

    def load(self, start: Start, progress: Callable[[Progress], None]) -> ModelInfo:
        """Load the weights, size the KV cache, warm up.

        Raises:
            ModelError: one line that names file and tensor, or device and bytes.
        """

    def submit(self, step: Step) -> PendingStep:
        """Start a step. At most two are pending at a time; tokens of the first feed the second."""

    def sleep(self, level: int) -> dict[str, int]:
        """Give memory back and forget every sequence. No step is pending.

        Args:
            level: 1 moves weights to host memory and drops the KV cache; 2 drops the weights as well.
                Higher than that of a sleep that lasts.

        Returns:
            What → bytes that this call gave back, as measured: on the device, on a CPU of memory.
        """

    def wake(self, progress: Callable[[Progress], None]) -> ModelInfo:
        """Be again as after `load`, after any level; the number of KV blocks may differ.

        Raises:
            ModelError: the weights cannot be loaded any more, or there is no room for them.
        """

    def close(self) -> dict[str, float]:
        """Release graphs, KV cache, weights, process groups, device cache, in that order.

        Returns:
            Seconds per stage. Calling it again, or before `load`, does nothing.
        """
