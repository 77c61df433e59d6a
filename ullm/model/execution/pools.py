"""Which KV pool fits a model on a CPU."""

from __future__ import annotations

from ullm.model.architectures.decoder import Decoder
from ullm.model.attention.batch import CausalModel
from ullm.model.attention.gather import GatherAttention
from ullm.model.kernels.cpu.ops import KernelAttention, KernelOps


def choose_gather(model: CausalModel) -> type[GatherAttention | KernelAttention]:
    """Return the CPU attention backend that fits how the model computes its layers."""
    if isinstance(model, Decoder) and isinstance(model.ops, KernelOps):
        return KernelAttention
    return GatherAttention
