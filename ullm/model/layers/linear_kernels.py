"""How a linear layer is computed on this machine: chosen once per model, not once per call.

On CPUs oneDNN multiplies by weights that were packed for it beforehand; that reads them faster than
``F.linear``, most of all with few rows: all linear layers of SmolLM2-135M in bfloat16 on two cores
take 5.7 ms instead of 8.8 ms for one row, 12.0 instead of 15.0 for 32, and float32 gains a factor of 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ullm.model.layers.quantization import QuantizedWeight

Linear = Callable[[Tensor], Tensor]
"""``[rows, in]`` → ``[rows, out]``."""

PACK_FOR_ROWS = 16
"""Rows that oneDNN chooses the packed layout for. Measured: as good at 1 and 256 rows."""


class LinearKernel(Protocol):
    """How linear layers are computed: from weights that were brought into the kernel's own layout."""

    def pack(self, weight: Tensor) -> Tensor:
        """``weight [out, in]`` in the kernel's layout; the argument may be dropped afterwards."""

    def linear(self, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Linear:
        """The layer with weights of `pack`, which it keeps."""


@runtime_checkable
class QuantizedKernel(LinearKernel, Protocol):
    """A kernel that multiplies by weights of few bits as well."""

    def pack_quantized(self, weight: QuantizedWeight) -> Tensor:
        """As ``pack``."""


def pack_weight(kernel: LinearKernel, weight: nn.Parameter | QuantizedWeight) -> Tensor:
    """A weight in the kernel's layout.

    Raises:
        TypeError: a quantized weight for a kernel that cannot multiply by it.
    """
    if not isinstance(weight, QuantizedWeight):
        return kernel.pack(weight.data)
    if not isinstance(kernel, QuantizedKernel):
        raise TypeError(f"{type(kernel).__name__} cannot multiply by quantized weights")
    return kernel.pack_quantized(weight)


class PlainKernel:
    """PyTorch's own; implements `LinearKernel`."""

    def pack(self, weight: Tensor) -> Tensor:
        """As it is."""
        return weight

    def linear(self, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Linear:
        """See `LinearKernel`."""
        return lambda x: F.linear(x, packed, bias)


class OneDnnKernel:
    """oneDNN with prepacked weights, for CPUs, in bfloat16 and float32; implements `LinearKernel`."""

    def pack(self, weight: Tensor) -> Tensor:
        """A tensor that only oneDNN understands."""
        blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_FOR_ROWS)
        return blocked

    def linear(self, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int) -> Linear:
        """See `LinearKernel`."""
        multiply = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: multiply(x, packed, bias, "none", [], "")


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32 (AVX-512 BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def choose_linear_kernel(device: torch.device, dtype: torch.dtype) -> LinearKernel:
    """The fastest kernel that works for this device and these numbers."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return PlainKernel()
    kernel = OneDnnKernel()
    try:  # private operators, and not every CPU has bfloat16 ones: the proof is in a small product
        kernel.linear(kernel.pack(torch.ones(16, 16, dtype=dtype)), None, 16, 16)(
            torch.ones(1, 16, dtype=dtype)
        )
    except (AttributeError, RuntimeError):
        return PlainKernel()
    return kernel
