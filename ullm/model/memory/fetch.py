"""Copies from the device to the host that run in the background until their values are needed."""

from __future__ import annotations

import torch
from torch import Tensor


class Fetched:
    """Host copies of tensors, in progress. On a CPU they are the tensors themselves.

    Args:
        tensors: the tensors to copy, all on one device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            tensors = tuple(_start(tensor) for tensor in tensors)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        self._tensors = tensors

    def done(self) -> bool:
        """Return True if `wait` would return at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> tuple[Tensor, ...]:
        """Wait until the copies are complete and return them."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def _start(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
