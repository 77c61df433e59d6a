"""Print the limits of a device as JSON, run as ``PYTHON device_limits.py auto|cpu|cuda``.

``arithmetic``: operations per second of a matrix product in bfloat16 or float32, whichever is faster: without
instructions for bfloat16 it is far slower. ``integer``: the same of eight-bit integers; 0 where PyTorch has
no product of them. ``bandwidth``: bytes per second of a large copy, read and written ones together; null on a
CPU, where one thread's copy says little.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

COPY_BYTES = 2 << 30
"""Bytes to copy; far more than any cache holds."""
SIZES = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the matrices; the speed does not grow beyond them."""
REPEATS = 12
MOST_SECONDS = 3.0
"""Seconds after which a measurement is not repeated: bfloat16 without instructions for it takes that long."""


def main(device: str) -> None:
    """Measure, and print the result."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    limits: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "arithmetic": max(speed(dtype, device) for dtype in (torch.bfloat16, torch.float32)),
        "integer": integer_speed(device),
        "bandwidth": None,
    }
    if device == "cuda":
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        limits["bandwidth"] = 2 * COPY_BYTES / best(lambda: target.copy_(source), device)
    sys.stdout.write(json.dumps(limits) + "\n")


def speed(dtype: Any, device: str) -> float:
    """Return the operations per second of a product of square matrices of a dtype."""
    import torch

    size = SIZES[device]
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    multiply = torch._int_mm if dtype is torch.int8 else torch.mm
    return float(2 * size**3 / best(lambda: multiply(matrix, matrix), device))


def integer_speed(device: str) -> float:
    """Return the speed of eight-bit integers; 0 where PyTorch cannot multiply them."""
    import torch

    try:  # the operator is private
        return speed(torch.int8, device)
    except (AttributeError, RuntimeError):
        return 0.0


def best(work: Callable[[], object], device: str) -> float:
    """Return the minimum seconds of several runs."""
    import torch

    least, end = float("inf"), time.perf_counter() + MOST_SECONDS
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - began)
        if time.perf_counter() > end:
            break
    return least


if __name__ == "__main__":
    main(sys.argv[1])
