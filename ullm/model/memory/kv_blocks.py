"""KV blocks as bytes, on their way from one rank's pool to another's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def read_blocks(rows: Sequence[Tensor], block_ids: Sequence[int]) -> memoryview:
    """Return the content of blocks: tensor by tensor, and in each the blocks in the given order.

    Args:
        rows: the pool, as `ullm.model.attention.batch.AttentionBackend.block_rows` returns it.
    """
    content = torch.empty(_size(rows, len(block_ids)), dtype=torch.uint8)
    index = torch.tensor(block_ids, dtype=torch.int64, device=rows[0].device)
    end = 0
    for pool in rows:
        part = pool.index_select(0, index).view(torch.uint8).reshape(-1)
        content[end : end + part.numel()] = part
        end += part.numel()
    return content.numpy().data.cast("B")


def write_blocks(rows: Sequence[Tensor], block_ids: Sequence[int], content: bytearray) -> None:
    """Set the content of blocks to what `read_blocks` has returned.

    Raises:
        ValueError: it is not as long as theirs.
    """
    if len(content) != _size(rows, len(block_ids)):
        raise ValueError(f"{len(content)} bytes for {len(block_ids)} KV blocks")
    index = torch.tensor(block_ids, dtype=torch.int64, device=rows[0].device)
    start = 0
    for pool in rows:
        count = len(block_ids) * pool.shape[1]
        part = torch.frombuffer(content, dtype=pool.dtype, count=count, offset=start)
        pool.index_copy_(0, index, part.view(len(block_ids), -1).to(pool.device))
        start += count * pool.itemsize


def _size(rows: Sequence[Tensor], count: int) -> int:
    return sum(count * pool.shape[1] * pool.itemsize for pool in rows)
