"""Copies from the host to the device that nothing waits for.

Indexing a GPU tensor by a list, or copying from memory that is not pinned, makes the host wait for everything
submitted before: with asynchronous scheduling, for the whole running step. So a step's inputs are copied from
pinned memory, all of them in one copy, because each copy costs about as much as a kernel launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.generic]

ALIGNMENT = 16
"""Bytes; a view of any dtype may start at a multiple."""


def upload(device: torch.device, *arrays: Array) -> list[Tensor]:
    """Return the arrays as tensors on the device; on a CPU they share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return move(device, arrays, pinned=True)


def upload_list(device: torch.device, values: Sequence[object], dtype: npt.DTypeLike = np.int64) -> Tensor:
    """Upload one list, or lists of equal length, as `upload` does."""
    return upload(device, np.array(values, dtype=dtype))[0]


def select_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return ``tensor[rows]`` for ascending rows, without a copy if they are all of them."""
    if len(rows) == len(tensor):
        return tensor
    return tensor.index_select(0, upload_list(tensor.device, rows))


def move(device: torch.device, arrays: Sequence[Array], *, pinned: bool) -> list[Tensor]:
    """Pack the arrays into one buffer, copy it to the device, and return views of the parts.

    PyTorch does not reuse pinned memory before the copies from it are complete.
    """
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    host = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    packed = host.numpy()
    for start, array in zip(starts, arrays, strict=True):
        packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = host.to(device, non_blocking=True)
    return [
        whole[start : start + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


_DTYPES = {"int32": torch.int32, "int64": torch.int64, "float64": torch.float64}
