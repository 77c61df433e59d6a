"""How a linear layer is computed on this machine: chosen once per model, not once per call.

On CPUs oneDNN multiplies by weights that were packed for it beforehand; that reads them faster than
``F.linear``, most of all with few rows: all linear layers of SmolLM2-135M in bfloat16 on two cores
take 5.7 ms instead of 8.8 ms for one row, 12.0 instead of 15.0 for 32, and float32 gains a factor of 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
"""``[rows, in]`` → ``[rows, out]``."""
LinearKernel = Callable[[Tensor, Tensor | None], Linear]
"""Turns ``(weight [out, in], bias [out])`` into a `Linear`; the weight may be dropped afterwards."""

PACK_FOR_ROWS = 16
"""Rows that oneDNN chooses the packed layout for. Measured: as good at 1 and 256 rows."""


def plain(weight: Tensor, bias: Tensor | None) -> Linear:
    """PyTorch's own."""
    return lambda x: F.linear(x, weight, bias)


def packed(weight: Tensor, bias: Tensor | None) -> Linear:
    """oneDNN with prepacked weights; for CPUs, in bfloat16 and float32."""
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_FOR_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, blocked, bias, "none", [], "")


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32 (AVX-512 BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def choose_linear_kernel(device: torch.device, dtype: torch.dtype) -> LinearKernel:
    """The fastest kernel that works for this device and these numbers."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return plain
    try:  # private operators, and not every CPU has bfloat16 ones: the proof is in a small product
        packed(torch.ones(16, 16, dtype=dtype), None)(torch.ones(1, 16, dtype=dtype))
    except (AttributeError, RuntimeError):
        return plain
    return packed
