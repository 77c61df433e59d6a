"""Fused operations of a decoder layer, in Triton, which comes with PyTorch for CUDA.

The time of a decode step with few rows depends on the number of kernels: each takes some two microseconds of
the GPU, however little it does. PyTorch needs some twenty per layer for what these three compute. They
compute in float32 and round once; `ullm.model.layers.layer_ops.TorchStep` is the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SILU_BLOCK = 1024
WARP_COLUMNS = 512
"""Columns of a row per warp."""


@triton.jit
def _add_norm(
    x, delta, weight, out, EPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr,
) -> None:  # fmt: skip
    """Add and normalise; one program per row."""
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + columns
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        added = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + added).to(x.dtype.element_ty)
        tl.store(x + at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + EPS)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (wide * scale * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_and_mul(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Compute ``silu(gate) * up``; one program per row and `BLOCK` columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    source = gate_up + row * 2 * SIZE + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + SIZE, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_and_store(
    qkv, queries, keys, values, slots, positions, cos, sin,
    q_weight, k_weight, EPS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
) -> None:  # fmt: skip
    """Normalise, rotate and store; one program per token and head: queries first, then keys, then values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    index = tl.arange(0, BLOCK)
    inside = index < SIZE
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * SIZE
    value = tl.load(source + index, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        partner = (index + SIZE // 2) % SIZE
        other = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(value * value, 0) / SIZE + EPS)
            if head < HEADS:
                factor = tl.load(q_weight + index, mask=inside, other=0.0).to(tl.float32)
                other_factor = tl.load(q_weight + partner, mask=inside, other=0.0).to(tl.float32)
            else:
                factor = tl.load(k_weight + index, mask=inside, other=0.0).to(tl.float32)
                other_factor = tl.load(k_weight + partner, mask=inside, other=0.0).to(tl.float32)
            value = value * scale * factor
            other = other * scale * other_factor
        angle = tl.load(positions + token) * SIZE + index
        cosine = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        value = value * cosine + other * sine
    rounded = value.to(queries.dtype.element_ty)
    if head < HEADS:
        tl.store(queries + (token * HEADS + head) * SIZE + index, rounded, mask=inside)
    else:
        row = tl.load(slots + token) * KV_HEADS
        if head < HEADS + KV_HEADS:
            tl.store(keys + (row + head - HEADS) * SIZE + index, rounded, mask=inside)
        else:
            tl.store(values + (row + head - HEADS - KV_HEADS) * SIZE + index, rounded, mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add ``delta`` to ``x [T, size]`` in place; return its norm."""
    out, size = torch.empty_like(x), x.shape[1]
    block = triton.next_power_of_2(size)
    warps = min(16, max(1, block // WARP_COLUMNS))
    added = x if delta is None else delta
    _add_norm[(len(x),)](x, added, weight, out, eps, size, block, delta is not None, num_warps=warps)
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` of ``[T, gate and up side by side]``."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    _silu_and_mul[(rows, triton.cdiv(size, SILU_BLOCK))](gate_up, out, size, SILU_BLOCK, num_warps=4)
    return out


def rotate_and_store(
    qkv: Tensor,
    pool: Tensor,
    slots: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """Normalise and rotate queries and keys, store keys and values, and return the queries.

    Args:
        qkv: ``[T, (query heads + 2 * KV heads) * head_dim]``.
        pool: ``[keys or values, blocks, block size, KV heads, head_dim]``, contiguous.
        slots: ``[T]`` int64, the slot of each token's KV.
        positions: ``[T]`` int64.
        tables: cosines and sines of `ullm.model.layers.rope.rope_cache`.
        norms: weights of the norms of queries and keys; None: no norms.
        eps: epsilon of the norms.

    Returns:
        ``[T, query heads, head_dim]``.
    """
    kv_heads, size = pool.shape[3:]
    heads = qkv.shape[1] // size - 2 * kv_heads
    queries = qkv.new_empty(len(qkv), heads, size)
    q_weight, k_weight = norms if norms is not None else (qkv, qkv)
    _rotate_and_store[(len(qkv), heads + 2 * kv_heads)](
        *(qkv, queries, pool[0], pool[1], slots, positions, *tables, q_weight, k_weight),
        *(eps, heads, kv_heads, size, triton.next_power_of_2(size), norms is not None),
        num_warps=1,
    )
    return queries
