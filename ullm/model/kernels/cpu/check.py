"""``python -m ullm.model.kernels.cpu.check``: compile the kernels if need be, and compare them with PyTorch.

A process of its own, because kernels for another processor end it with SIGILL.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

from ullm.model.kernels.cpu.build import NoLibrary, require_library, variant
from ullm.model.kernels.cpu.kernels import NAMES, CpuKernels
from ullm.model.layers.quantization import Bits, quantize

ROWS, INPUTS, OUTPUTS = 3, 256, 128
TOLERANCE = 0.02
"""Largest difference, as a share of the largest result: a few roundings of bfloat16, or of an input to eight
bits, as the quantized kernels round it."""


def check() -> dict[str, Any]:
    """Return ``variant``, ``seconds`` until it was loaded, ``errors`` by kernel, ``problem`` or None."""
    began = time.monotonic()
    try:
        library = require_library()
    except NoLibrary as error:
        return {"variant": None, "seconds": 0.0, "errors": {}, "problem": str(error)}
    seconds = time.monotonic() - began
    errors = {
        f"{name} {NAMES[dtype]}": error
        for dtype in NAMES
        for name, error in errors_of(CpuKernels(library, dtype)).items()
    }
    wrong = [f"{name} by {error:.3g}" for name, error in errors.items() if not error <= TOLERANCE]
    problem = f"they compute wrongly: {', '.join(wrong)}; use --no-cpu-kernels" if wrong else None
    return {"variant": variant(library), "seconds": seconds, "errors": errors, "problem": problem}


def errors_of(kernels: CpuKernels) -> dict[str, float]:
    """Return kernel → the largest difference from PyTorch's result, as a share of the largest result."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, INPUTS, generator=generator).to(kernels.dtype)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator).to(kernels.dtype)
    multiply = kernels.linear(kernels.pack(weight), None, OUTPUTS, INPUTS)
    errors = {"linear": _error(multiply(x), x.float() @ weight.float().T)}
    bits: Bits
    for bits in (8, 4):
        quantized = quantize(weight.float(), bits)
        multiply = kernels.linear(kernels.pack_quantized(quantized), None, OUTPUTS, INPUTS)
        errors[f"int{bits}"] = _error(multiply(x), x.float() @ quantized.dequantize().float().T)
    sums = torch.randn(ROWS, INPUTS, generator=generator)
    scale = torch.rand(INPUTS, generator=generator)
    expected = sums * torch.rsqrt(sums.square().mean(-1, keepdim=True) + 1e-5) * scale
    errors["norm"] = _error(kernels.add_rms_norm(sums.clone(), None, scale, 1e-5).float(), expected)
    return errors


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    sys.stdout.write(json.dumps(check()) + "\n")
