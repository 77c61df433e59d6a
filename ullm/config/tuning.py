"""How the CPU kernels divide their work; measured for a machine, so not an option."""

from __future__ import annotations

import msgspec


class Tuning(msgspec.Struct, frozen=True):
    """How the CPU kernels divide a product. Every choice gives the same result, bit by bit.

    Args:
        chunk_tiles: tiles of rows that are multiplied by the same weights in turn.
        piece: groups of quantized weights that a thread takes at a time.
        prefetch: whether the next weights are prefetched.
        origin: ``default``, or ``calibrated on`` a date.
        model: the model that it was measured for.
    """

    chunk_tiles: int = 8
    piece: int = 48
    prefetch: bool = True
    origin: str = "default"
    model: str = ""

    def __post_init__(self) -> None:
        if not (1 <= self.chunk_tiles <= 1024 and 1 <= self.piece <= 1024):
            raise ValueError("out of range")

    @property
    def label(self) -> str:
        """What differs from the default."""
        default = Tuning()
        names = ("chunk_tiles", "piece", "prefetch")
        changed = [f"{n}={getattr(self, n)}" for n in names if getattr(self, n) != getattr(default, n)]
        return ", ".join(changed) or "default"
