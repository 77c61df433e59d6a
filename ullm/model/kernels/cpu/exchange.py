"""Collectives of CPU ranks on one machine through shared memory; exchange.h describes how.

The memory has no name: the first rank makes it, the others open it through that one's descriptor, and the
system frees it with the last process that maps it, however that one ends. Linux only; elsewhere, and where a
rank cannot open it, all ranks use Gloo.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from ullm.machine import open_memory

CAPACITY = 256 << 10
"""Bytes of a slot: more are exchanged in several rounds."""
SPINS = 4000
"""Looks at another rank's round before sleeping: about 50 microseconds, as in pool.h."""


class ExchangeStruct(ctypes.Structure):
    """``Exchange`` of exchange.h."""

    _fields_ = (
        ("segment", c_void_p),
        *((name, c_int64) for name in ("ranks", "rank", "capacity", "spins")),
        ("timeout", c_double),
        *((name, c_int64) for name in ("round", "failed")),
    )


class SharedExchange:
    """One rank's end; implements `ullm.model.layers.parallel.Exchange`.

    Args:
        library: the compiled kernels.
        ranks: number of ranks that share the memory.
        rank: this one.
        path: how to open the memory that rank 0 has made; None: make it.
        spins: looks at other ranks before sleeping; 0 where no core is to spare.
        timeout: seconds to wait for another rank.

    Raises:
        OSError: the memory cannot be made or opened.
    """

    def __init__(
        self, library: ctypes.CDLL, ranks: int, rank: int, path: str | None, *, spins: int, timeout: float
    ) -> None:
        self._library = library
        library.exchange_size.restype = c_int64
        size = library.exchange_size(c_int64(ranks), c_int64(CAPACITY))
        self._descriptor = open_memory("ullm-ranks", size) if path is None else os.open(path, os.O_RDWR)
        try:
            self._memory = mmap.mmap(self._descriptor, size)
        except (OSError, ValueError) as error:
            self.forget_path()
            raise OSError(f"shared memory cannot be mapped: {error}") from None
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.struct = ExchangeStruct(self._bytes.data_ptr(), ranks, rank, CAPACITY, spins, timeout, 0, 0)

    @property
    def path(self) -> str:
        """How the other ranks open the memory, until `forget_path`."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def forget_path(self) -> None:
        """Close the descriptor: all ranks have mapped the memory."""
        os.close(self._descriptor)

    def all_reduce(self, x: Tensor) -> None:
        """Add up contiguous float32 over the ranks, in place.

        Raises:
            RuntimeError: another rank did not answer in time.
        """
        self._library.exchange_sum(ctypes.byref(self.struct), c_void_p(x.data_ptr()), c_int64(x.numel()))
        self.check()

    def gather(self, x: Tensor) -> Tensor:
        """Return the ranks' tensors of equal shape and dtype, ``[ranks, *shape]``.

        Raises:
            RuntimeError: another rank did not answer in time.
        """
        x = x.contiguous()
        found = torch.empty((self.struct.ranks, *x.shape), dtype=x.dtype)
        self._library.exchange_gather(
            ctypes.byref(self.struct), c_void_p(x.data_ptr()), c_int64(x.nbytes), c_void_p(found.data_ptr())
        )
        self.check()
        return found

    def check(self) -> None:
        """Raise RuntimeError if another rank did not answer in time."""
        if self.struct.failed:
            raise RuntimeError(f"another rank did not answer within {self.struct.timeout:g} s")
