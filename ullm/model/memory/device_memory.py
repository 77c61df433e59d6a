"""The device memory that this process holds, and how it returns to the system.

Freed memory is not yet returned: PyTorch keeps freed blocks of a GPU for later, and the C library keeps freed
pages of the heap. Both are told to release them, and the measured difference is reported.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROLLUP = Path("/proc/self/smaps_rollup")


def held_bytes(device: torch.device) -> int | None:
    """Return the bytes of the device that this process holds, unused ones included; on a CPU, resident ones.

    None where the system does not say: outside of Linux.
    """
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        # Not statm, which may be off by some pages per core.
        lines = ROLLUP.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:")), None)


def release_cached_memory(device: torch.device) -> None:
    """Return memory to the system that is freed but still cached."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(ctypes.c_size_t(0))


class MemoryMeter:
    """Measures how much memory each release returns to the system.

    Attributes:
        freed_bytes: name of what was released → bytes.
    """

    def __init__(self, device: torch.device) -> None:
        release_cached_memory(device)
        self._device, self._held = device, held_bytes(device)
        self.freed_bytes: dict[str, int] = {}

    def release(self, what: str, free: Callable[[], None], nominal: int) -> None:
        """Free something and measure the difference.

        Args:
            what: its name in ``freed_bytes``.
            free: frees it.
            nominal: bytes to report where nothing can be measured.
        """
        free()
        release_cached_memory(self._device)
        now = held_bytes(self._device)
        measured = nominal if now is None or self._held is None else max(0, self._held - now)
        self.freed_bytes[what] = measured
        self._held = now
