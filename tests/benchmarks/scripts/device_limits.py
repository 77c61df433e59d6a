"""Print the limits of a device as JSON, run as ``PYTHON device_limits.py auto|cpu|cuda``.

``arithmetic``: operations per second of a bfloat16 matrix product. ``bandwidth``: bytes per second of a large
copy, read and written ones together; null on a CPU, where one thread's copy says little.
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


def main(device: str) -> None:
    """Measure, and print the result."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[device]
    matrix = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    limits: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "arithmetic": 2 * size**3 / best(lambda: torch.mm(matrix, matrix), device),
        "bandwidth": None,
    }
    if device == "cuda":
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        limits["bandwidth"] = 2 * COPY_BYTES / best(lambda: target.copy_(source), device)
    sys.stdout.write(json.dumps(limits) + "\n")


def best(work: Callable[[], object], device: str) -> float:
    """Return the minimum seconds of several runs."""
    import torch

    least = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - began)
    return least


if __name__ == "__main__":
    main(sys.argv[1])
