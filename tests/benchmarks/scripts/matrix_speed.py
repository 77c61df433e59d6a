"""Print the operations per second of a bfloat16 matrix product on all cores; the best of a few."""

from __future__ import annotations

import sys
import time

SIZE = 1536
"""Rows and columns; the speed did not grow beyond them on any machine tried."""
REPEATS = 12


def main() -> None:
    """Measure, and print the result."""
    import torch

    matrix = torch.ones(SIZE, SIZE, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - began)
    sys.stdout.write(f"{2 * SIZE**3 / best:.0f}\n")


if __name__ == "__main__":
    main()
