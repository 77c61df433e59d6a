"""The runner: the only interface between the worker loop and the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ullm.protocol.messages import Adapter, ModelInfo, Prepare, Progress, Start, Step, StepResult


class PendingStep(Protocol):
    """A step that was submitted; on a GPU its kernels may still be running."""

    def done(self) -> bool:
        """Whether `result` would return at once."""

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled. Called once, in order of submission."""


class Runner(Protocol):
    """One rank of a model. Built without arguments, and used from one thread at a time."""

    def prepare(self, prepare: Prepare, progress: Callable[[Progress], None]) -> None:
        """In a standby worker: do the part of `load` that commits to nothing.

        It may only use memory that is shared or small; it must not meet other ranks, nor create a context on
        a device. `load` may follow with other values, or never. Errors are ignored here: `load` reports them.
        """

    def load(self, start: Start, progress: Callable[[Progress], None]) -> ModelInfo:
        """Load the weights, size the KV cache, warm up.

        Raises:
            ModelError: says in one line which file and tensor, or which device and how many bytes.
        """

    def submit(self, step: Step) -> PendingStep:
        """Start a step. At most two are pending at a time; the second one uses the tokens of the first."""

    def keep_adapter(self, adapter: Adapter, *, wanted: bool) -> str:
        """Load an adapter, or drop it once no sequence uses it.

        Returns:
            Why it cannot be loaded; an empty text if it is, or was dropped.
        """

    def export_blocks(self, block_ids: list[int]) -> memoryview:
        """Return the content of KV blocks, as bytes, in an order of the runner's own. No step is pending."""

    def import_blocks(self, block_ids: list[int], content: bytearray) -> None:
        """Set the content of KV blocks to what `export_blocks` of an equal rank has returned.

        No step is pending, and no sequence has these blocks.

        Raises:
            ValueError: the content is not as long as that of so many blocks.
        """

    def sleep(self, level: int) -> dict[str, int]:
        """Free memory and release every sequence. No step is pending.

        Args:
            level: 1 moves weights to host memory and drops the KV cache; 2 drops the weights as well.
                Higher than the current level.

        Returns:
            Kind of memory → bytes, as measured on the device (on a CPU in main memory).
        """

    def wake(self, progress: Callable[[Progress], None]) -> ModelInfo:
        """Return to the state after `load`, from any level; the number of KV blocks may differ.

        Raises:
            ModelError: the weights can no longer be loaded, or there is no room for them.
        """

    def close(self) -> dict[str, float]:
        """Release graphs, KV cache, weights, process groups, device cache, in that order.

        Returns:
            Seconds per stage. Calling it again, or before `load`, does nothing.
        """
