"""Options of ullm that a user might try for speed, each beside the default."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """ullm with other options than its defaults.

    Args:
        options: of ``ullm serve``.
        counts: whether the option leaves weights, texts and their independence of the batch as they are, so
            that the default must not be slower; otherwise it is shown for information.
    """

    name: str
    options: str
    counts: bool

    @property
    def spec(self) -> str:
        """``NAME=OPTIONS``."""
        return f"{self.name}={self.options}"


DEFAULT = Variant("default", "", counts=False)
AGAIN = Variant("default again", "", counts=False)
"""The default once more: its distance from the first shows how much the machine's noise is."""
VARIANTS = (
    Variant("1 thread", "--cpu-threads 1", counts=True),
    Variant("2 threads", "--cpu-threads 2", counts=True),
    Variant("4 threads", "--cpu-threads 4", counts=True),
    Variant("no standby", "--standby-workers 0", counts=True),
    Variant("worker thread", "--transport thread --standby-workers 0", counts=True),
    Variant("no step ahead", "--steps-ahead 0", counts=True),
    Variant("no prefix cache", "--no-prefix-cache", counts=True),
    Variant("blocks of 64", "--block-size 64", counts=True),
    Variant("steps of 128", "--max-num-batched-tokens 128", counts=True),
    Variant("steps of 2048", "--max-num-batched-tokens 2048", counts=True),
    # Texts stay the same, but what is gained depends on how much they repeat themselves.
    Variant("speculation", "--speculate 4", counts=False),
    Variant("float32", "--dtype float32", counts=False),
    Variant("bfloat16", "--dtype bfloat16", counts=False),
    Variant("PyTorch", "--no-cpu-kernels", counts=False),
    Variant("int8", "--quantization int8", counts=False),
    Variant("int4", "--quantization int4", counts=False),
)
