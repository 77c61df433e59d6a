"""The number of KV blocks, and the memory that they live in."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ullm.config import GIB, CacheConfig
from ullm.errors import OutOfMemory
from ullm.machine import available_memory

VARLEN_BLOCK_MULTIPLE = 256
"""Block sizes that Flash Attention's paged kernels take are multiples of this."""
CPU_SHARE, CPU_LIMIT = 4, 1 * GIB
"""A CPU's pool gets a quarter of the available memory, at most 1 GiB: compute usually runs out before a
larger one would be filled, and other programs need memory too."""
HUGE_PAGES_FROM = 4 << 20
"""Bytes from which on a pool uses huge pages."""


@dataclass(frozen=True)
class KvShape:
    """Shape of one token's keys and values on this rank.

    Args:
        num_layers: number of layers with attention.
        num_kv_heads: number of KV heads of this rank.
        head_dim: size of each key and value.
        num_query_heads: number of query heads of this rank.
        window: keys that a query sees in the layer that sees most; None: all. Keys and values behind it are
            never read again.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_query_heads: int
    window: int | None = None


def common_window(windows: Iterable[int | None]) -> int | None:
    """Return the largest of the layers' sliding windows; None: a layer sees all keys."""
    sizes = list(windows)
    return None if None in sizes else max(size for size in sizes if size is not None)


def effective_block_size(block_size: int, *, varlen: bool) -> int:
    """Return the block size to use: with varlen attention, rounded up to what its kernels take."""
    return -(-block_size // VARLEN_BLOCK_MULTIPLE) * VARLEN_BLOCK_MULTIPLE if varlen else block_size


def kv_bytes_per_token(shape: KvShape, dtype: torch.dtype) -> int:
    """Return the bytes that one token's keys and values take in all layers of this rank."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize


def count_blocks(config: CacheConfig, block_bytes: int, budget: int) -> int:
    """Return how many blocks the pool gets.

    Args:
        config: ``num_blocks`` decides if it is set, else ``kv_cache_memory``.
        block_bytes: bytes of one block in all layers.
        budget: bytes to use if neither is set.

    Raises:
        OutOfMemory: not even one block fits.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    memory = budget if config.kv_cache_memory is None else config.kv_cache_memory
    if memory < block_bytes:
        raise OutOfMemory(
            f"not enough memory for one block of KV: it takes {mib(block_bytes)}, "
            f"there are {mib(max(memory, 0))}; raise --kv-cache-memory or lower --block-size"
        )
    return memory // block_bytes


def check_fits(num_blocks: int, block_bytes: int) -> None:
    """Check that a CPU's memory can hold a full pool, since its memory is taken only as it is used.

    Raises:
        OutOfMemory: the memory is too small.
    """
    need, free = num_blocks * block_bytes, available_memory()
    if need > free:
        raise OutOfMemory(
            f"the KV cache of {num_blocks} blocks needs {mib(need)}, there are {mib(free)}; "
            "lower --kv-cache-memory or --num-blocks"
        )


def cpu_budget() -> int:
    """Return the bytes that a CPU's pool gets by default."""
    return min(available_memory() // CPU_SHARE, CPU_LIMIT)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros on the CPU that occupy no memory until they are touched, and none once they are freed.

    ``torch.zeros`` touches every page; ``torch.empty`` may hold old NaNs, which survive a multiplication by a
    probability of 0; and memory from either, or from numpy, may return to a heap instead of to the system.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if sys.platform == "win32":
        return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype, count=count).view(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux" and size >= HUGE_PAGES_FROM:
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


def mib(count: int) -> str:
    """Format bytes as MiB."""
    return f"{count / (1 << 20):,.1f} MiB"
