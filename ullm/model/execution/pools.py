"""Which KV pool fits a model on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ullm.model.architectures.decoder import Decoder
from ullm.model.attention.batch import CausalModel
from ullm.model.attention.gather import GatherAttention
from ullm.model.kernels.cpu.ops import KernelAttention, KernelOps


def choose_gather(model: CausalModel) -> Callable[..., GatherAttention | KernelAttention]:
    """Return what makes the CPU attention backend that fits how the model computes its layers."""
    if isinstance(model, Decoder) and isinstance(model.ops, KernelOps):
        return partial(KernelAttention, tile_rows=model.ops.kernels.tile_rows)
    return GatherAttention
