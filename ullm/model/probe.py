"""``python -m ullm.model.probe``: print what torch can do on this machine, as one JSON object.

A process of its own, so that ``ullm doctor`` survives a torch installation that crashes.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from ullm.machine import cpu_quota, usable_cores
from ullm.model.kernels.cpu.build import compiled_variant, find_compiler

SIZE = 512
REPEATS = 8


def probe() -> dict[str, Any]:
    """Return versions, devices, and the speed of a matrix product in each dtype, in GFLOP/s."""
    import torch

    report: dict[str, Any] = {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": min(torch.get_num_threads(), usable_cores()),
        "quota": cpu_quota(),
        "compiler": find_compiler(),
        "kernels": compiled_variant(),
        "cuda": [],
        "gflops": {"cpu": speeds("cpu")},
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        device = {"name": properties.name, "capability": capability, "free": free, "total": total}
        report["cuda"].append(device)
        report["gflops"][f"cuda:{index}"] = speeds(f"cuda:{index}")
    return report


def speeds(device: str) -> dict[str, float]:
    """Return the GFLOP/s of a matrix product per dtype: the best of a few, undisturbed by other programs."""
    import torch

    size = SIZE if device == "cpu" else 8 * SIZE
    result = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        best = min(_seconds(matrix) for _ in range(REPEATS))
        result[str(dtype).removeprefix("torch.")] = round(2 * size**3 / best / 1e9, 1)
    return result


def _seconds(matrix: Any) -> float:
    import torch

    started = time.perf_counter()
    torch.mm(matrix, matrix)
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe()) + "\n")
