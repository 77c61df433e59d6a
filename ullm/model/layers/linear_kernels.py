"""Kernels of linear layers. One is chosen per model, not per call.

On CPUs oneDNN multiplies by weights that were packed for it beforehand. It reads them faster than
``F.linear``, above all with few rows: all linear layers of SmolLM2-135M in bfloat16 on two cores take 5.7 ms
instead of 8.8 ms for one row, 12.0 instead of 15.0 for 32, and float32 gains a factor of 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ullm.machine import arm_features
from ullm.model.layers.quantization import QuantizedWeight

Linear = Callable[[Tensor], Tensor]
"""A linear layer: ``[rows, in]`` → ``[rows, out]``."""

PACK_FOR_ROWS = 16
"""Number of rows that oneDNN chooses its packed layout for. Measured: as good at 1 and 256 rows."""


class LinearKernel(Protocol):
    """Computes linear layers from weights in a layout of its own."""

    def pack(self, weight: Tensor) -> Tensor:
        """Return ``weight [out, in]`` in the kernel's layout; the argument may be dropped afterwards."""

    def linear(self, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Linear:
        """Return a layer with weights from `pack`, which it keeps alive."""


@runtime_checkable
class QuantizedKernel(LinearKernel, Protocol):
    """A kernel that also multiplies by quantized weights."""

    def pack_quantized(self, weight: QuantizedWeight) -> Tensor:
        """Return a quantized weight in the kernel's layout."""


def pack_weight(kernel: LinearKernel, weight: nn.Parameter | QuantizedWeight) -> Tensor:
    """Return a weight in the kernel's layout.

    Raises:
        TypeError: the weight is quantized, and the kernel cannot multiply by such weights.
    """
    if not isinstance(weight, QuantizedWeight):
        return kernel.pack(weight.data)
    if not isinstance(kernel, QuantizedKernel):
        raise TypeError(f"{type(kernel).__name__} cannot multiply by quantized weights")
    return kernel.pack_quantized(weight)


class PlainKernel:
    """PyTorch's `F.linear`; implements `LinearKernel`."""

    def pack(self, weight: Tensor) -> Tensor:
        """Return the weight unchanged."""
        return weight

    def linear(self, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Linear:
        """See `LinearKernel`."""
        return lambda x: F.linear(x, packed, bias)


class OneDnnKernel:
    """oneDNN with prepacked weights, for CPUs, in bfloat16 and float32; implements `LinearKernel`."""

    def pack(self, weight: Tensor) -> Tensor:
        """Return a tensor in a layout that only oneDNN understands."""
        blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_FOR_ROWS)
        return blocked

    def linear(self, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Linear:
        """See `LinearKernel`."""
        multiply = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: multiply(x, packed, bias, "none", [], "")


def fast_bfloat16() -> bool:
    """Return True if this CPU multiplies bfloat16 faster than float32 (AVX-512 BF16, AMX or ARM's BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or "bf16" in arm_features())


def choose_linear_kernel(device: torch.device, dtype: torch.dtype) -> LinearKernel:
    """Return the fastest kernel that works for this device and dtype."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return PlainKernel()
    kernel = OneDnnKernel()
    try:  # the operators are private, and not every CPU has bfloat16 ones: try a small product
        kernel.linear(kernel.pack(torch.ones(16, 16, dtype=dtype)), None, 16, 16)(
            torch.ones(1, 16, dtype=dtype)
        )
    except (AttributeError, RuntimeError):
        return PlainKernel()
    return kernel
