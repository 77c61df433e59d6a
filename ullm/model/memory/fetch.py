"""Bringing numbers from the device to Python later, such that nothing waits until they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor


class Fetched:
    """Copies on the host, under way. On a CPU they are the tensors themselves.

    Args:
        tensors: on one device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            tensors = tuple(_start(tensor) for tensor in tensors)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        self._tensors = tensors

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> tuple[Tensor, ...]:
        """The copies, when they are complete."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def _start(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
