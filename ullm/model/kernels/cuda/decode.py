"""Paged attention of one query per sequence, in Triton. Importing this module requires Triton.

Flash Attention 2 multiplies tiles of 64 queries, but a decode has only as many as query heads share a KV
head: two for Qwen3-0.6B. On an H200, by the number of operations, the other 62 take about as long as reading
the KV. Here a tile has 16, the least that tensor cores take. Sequences are split into pieces by their own
lengths, not by the longest possible one (T. Dao et al., Flash-Decoding, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_ROWS = 16
"""Least number of queries that tensor cores multiply."""
LOG2_E = 1.4426950408889634
MOST_SPLITS = 64
"""Most pieces of a sequence."""
BLOCKS_PER_PROCESSOR = 4
"""Thread blocks that a multiprocessor should have, so that their reads hide each other's latency."""


@dataclass(frozen=True)
class Tiling:
    """A way to compile the kernel.

    Args:
        keys: keys per tile; divides the pool's block size.
        warps: warps per program.
        stages: stages of the loop's pipeline; one of them reads the block table.
    """

    keys: int
    warps: int
    stages: int


TILINGS = (Tiling(64, 4, 3), Tiling(64, 2, 3), Tiling(128, 8, 3))


@triton.jit(do_not_specialize=["table_stride", "splits"])  # not compiled for each value
def _decode(
    q, keys, values, tables, seq_lens, out, partial, weights, q_stride, table_stride, splits,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    SIZE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:  # fmt: skip
    """Attend for one piece of a sequence; one program per sequence, KV head and piece."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    piece = tl.program_id(2)
    length = tl.load(seq_lens + sequence)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    tiles = tl.cdiv(length, TILE) - first // TILE
    per_piece = tl.cdiv(tiles, splits)
    begin = (first // TILE + piece * per_piece) * TILE
    end = tl.minimum(begin + per_piece * TILE, length)

    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    head = kv_head * GROUP + row
    inside = (row[:, None] < GROUP) & (column[None, :] < SIZE)
    query = tl.load(
        q + sequence.to(tl.int64) * q_stride + head[:, None] * SIZE + column[None, :], mask=inside, other=0.0
    )
    key_index = tl.arange(0, TILE)
    most = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(begin, end, TILE):
        page = tl.load(tables + sequence.to(tl.int64) * table_stride + start // PAGE)
        slot = page.to(tl.int64) * PAGE + start % PAGE + key_index
        at = (slot[:, None] * KV_HEADS + kv_head) * SIZE + column[None, :]
        position = start + key_index
        seen = (position >= first) & (position < end)
        some = seen[:, None] & (column[None, :] < SIZE)
        key = tl.load(keys + at, mask=some, other=0.0)
        scores = tl.dot(query, tl.trans(key)) * SCALE
        scores = tl.where(seen[None, :], scores, -1e30)
        new_most = tl.maximum(most, tl.max(scores, 1))
        weight = tl.exp2(scores - new_most[:, None])
        weight = tl.where(seen[None, :], weight, 0.0)
        shrink = tl.exp2(most - new_most)
        value = tl.load(values + at, mask=some, other=0.0)
        sums = sums * shrink[:, None] + tl.dot(weight.to(value.dtype), value)
        total = total * shrink + tl.sum(weight, 1)
        most = new_most

    mean = sums / tl.maximum(total, 1e-30)[:, None]
    heads = KV_HEADS * GROUP
    if not SPLIT:
        target = out + (sequence.to(tl.int64) * heads + head[:, None]) * SIZE + column[None, :]
        tl.store(target, mean.to(out.dtype.element_ty), mask=inside)
    else:
        where = (sequence.to(tl.int64) * heads + head) * splits + piece
        tl.store(partial + where[:, None] * SIZE + column[None, :], mean, mask=inside)
        weight_of_piece = tl.where(total > 0.0, most + tl.log2(tl.maximum(total, 1e-30)), -1e30)
        tl.store(weights + where, weight_of_piece, mask=row < GROUP)


@triton.jit(do_not_specialize=["splits"])
def _combine(partial, weights, out, splits, SIZE: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    """Combine the pieces of a sequence; one program per sequence and head."""
    at = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < SIZE
    most = tl.load(weights + at * splits)
    for piece in range(1, splits):
        most = tl.maximum(most, tl.load(weights + at * splits + piece))
    total = 0.0
    mean = tl.zeros([COLUMNS], tl.float32)
    for piece in range(splits):
        weight = tl.exp2(tl.load(weights + at * splits + piece) - most)
        source = partial + (at * splits + piece) * SIZE + column
        mean += tl.load(source, mask=inside, other=0.0) * weight
        total += weight
    tl.store(out + at * SIZE + column, (mean / total).to(out.dtype.element_ty), mask=inside)


def decode_attention(
    q: Tensor,
    pool: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    *,
    scale: float,
    window: int,
    splits: int,
    tiling: Tiling,
) -> Tensor:
    """Compute attention of one query per sequence.

    Args:
        q: ``[N, query heads, head_dim]``; each query is contiguous.
        pool: ``[keys or values, blocks, block size, KV heads, head_dim]``, contiguous.
        seq_lens: ``[N]`` int32, the query's own position included.
        block_tables: ``[N, W]`` int32.
        scale: factor of the scores.
        window: keys that a query sees; 0: all.
        splits: number of pieces of each sequence.
        tiling: how the kernel is compiled.

    Returns:
        ``[N, query heads, head_dim]``.
    """
    count, heads, size = q.shape
    page, kv_heads = pool.shape[2:4]
    group, columns = heads // kv_heads, max(16, triton.next_power_of_2(size))
    out = q.new_empty(q.shape)
    partial = weights = out
    if splits > 1:
        partial = q.new_empty((count, heads, splits, size), dtype=torch.float32)
        weights = q.new_empty((count, heads, splits), dtype=torch.float32)
    _decode[(count, kv_heads, splits)](
        *(q, pool[0], pool[1], block_tables, seq_lens, out, partial, weights),
        *(q.stride(0), block_tables.stride(0), splits),
        *(scale * LOG2_E, window, kv_heads, group, size, page),
        *(max(LEAST_ROWS, triton.next_power_of_2(group)), columns, min(tiling.keys, page), splits > 1),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if splits > 1:
        _combine[(count * heads,)](partial, weights, out, splits, size, columns, num_warps=1)
    return out


def choose_splits(count: int, kv_heads: int, processors: int, longest: int, tile: int) -> int:
    """Return the number of pieces that yields enough thread blocks, with at least a tile in each."""
    wanted = BLOCKS_PER_PROCESSOR * processors // (count * kv_heads)
    return max(1, min(MOST_SPLITS, wanted, -(-longest // tile)))
