"""Weights kept in host memory while their device is used for something else.

The tensors stay in the model; only the memory behind them is taken away and restored, so views of a weight
stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ullm.logs import get_logger

log = get_logger(__name__)

CHUNK = 64 << 20
"""Bytes copied at a time. PyTorch rounds pinned memory up to a power of two, so whole weights could take
twice their size."""


class HostCopy:
    """A copy of tensors on the host, whose device memory is freed; until `restore` they must not be used.

    The copy is in pinned memory where possible: copying from it is several times as fast.

    Args:
        tensors: tensors on ``device``; those that share memory are copied once.
        device: where the tensors are.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self._device = device
        self._parts: list[tuple[torch.UntypedStorage, list[Tensor]]] = []
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        for storage in storages.values():
            chunks = [_host_chunk(part) for part in _chunks(storage)]
            self._parts.append((storage, chunks))
        self._wait()
        for storage, _ in self._parts:
            storage.resize_(0)

    @property
    def num_bytes(self) -> int:
        """Size of the copy in bytes."""
        return sum(chunk.nbytes for _, chunks in self._parts for chunk in chunks)

    def restore(self, progress: Callable[[], None]) -> None:
        """Allocate the tensors' memory again, copy their values back, and free the host's copy."""
        self._refill(progress)
        self._parts.clear()
        if self._device.type == "cuda":
            torch._C._host_emptyCache()  # pinned memory, which PyTorch would keep for later

    def _refill(self, progress: Callable[[], None]) -> None:
        for storage, chunks in self._parts:
            storage.resize_(sum(chunk.nbytes for chunk in chunks))
            for part, chunk in zip(_chunks(storage), chunks, strict=True):
                part.copy_(chunk, non_blocking=True)
                progress()
        self._wait()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _chunks(storage: torch.UntypedStorage) -> Iterator[Tensor]:
    """Return the memory as tensors of bytes."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return iter(torch.split(whole, CHUNK))


def _host_chunk(part: Tensor) -> Tensor:
    """Start a copy on the host and return it."""
    try:
        host = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
    except RuntimeError as error:  # limits on locked memory
        log.debug("host memory is not pinned", reason=str(error).splitlines()[0])
        host = torch.empty(part.shape, dtype=part.dtype)
    return host.copy_(part, non_blocking=True)
