"""Bringing numbers from Python to the device, such that nothing waits.

Indexing a tensor on a GPU by a list, or copying what is not pinned, makes the host wait for all that was
submitted before: with one step ahead, for the whole step that runs. So whatever a step needs is copied from
pinned memory, and all of it by one copy, because each costs about as much as launching a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.generic]

ALIGNMENT = 16
"""Bytes; views of every type can begin there."""


def upload(device: torch.device, *arrays: Array) -> list[Tensor]:
    """The arrays as tensors on the device; on a CPU they share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return move(device, arrays, pinned=True)


def upload_list(device: torch.device, values: Sequence[object], dtype: npt.DTypeLike = np.int64) -> Tensor:
    """As `upload`, for one list, or lists of equal length."""
    return upload(device, np.array(values, dtype=dtype))[0]


def select_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """``tensor[rows]``, rows that ascend; without a copy where they are all."""
    if len(rows) == len(tensor):
        return tensor
    return tensor.index_select(0, upload_list(tensor.device, rows))


def move(device: torch.device, arrays: Sequence[Array], *, pinned: bool) -> list[Tensor]:
    """Pack the arrays, copy them at once, and take them apart.

    PyTorch keeps pinned memory from being used again before copies from it are done.
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
