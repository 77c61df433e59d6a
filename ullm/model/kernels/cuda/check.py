"""Check that fused kernels compute what PyTorch computes, on this machine and for this model's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ullm.model.attention.batch import Batch
from ullm.model.layers.layer_ops import AttentionModule, TorchOps
from ullm.model.layers.linear import RMSNorm
from ullm.model.sampling.choose import SamplingFilter

ROWS = (1, 5)
BLOCKS, BLOCK_SIZE = 2, 8
VOCAB, CHOICES = 5000, 4
FILTERS: tuple[SamplingFilter, ...] = (
    (0, 0, 1, 0),
    (0.7, 0, 1, 0),
    (1, 0, 0.9, 0),
    (0.9, 20, 0.95, 0),
    (1.2, 0, 1, 0.05),
)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference between results near 1: a few roundings."""


class RecordingAttention:
    """Attention that only records its queries; implements `Attend` and `PagedAttend`."""

    def __init__(self, pool: Tensor, slot_mapping: Tensor) -> None:
        self._pool, self.slot_mapping = pool, slot_mapping
        self.queries = torch.empty(0)

    def pool(self, layer: int) -> Tensor:
        """See `PagedAttend`."""
        return self._pool

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        """Store keys and values, and record the queries."""
        for pool, new in zip(self._pool, (k, v), strict=True):
            pool.view(-1, *pool.shape[2:]).index_copy_(0, self.slot_mapping, new)
        return self.attend(layer, q, 1.0, None)

    def attend(self, layer: int, q: Tensor, scale: float, sliding_window: int | None) -> Tensor:
        """See `PagedAttend`."""
        self.queries = q.contiguous()
        return self.queries


@torch.no_grad()
def disagreements(
    fused: TorchOps, plain: TorchOps, module: AttentionModule, hidden: int, inner: int
) -> list[str]:
    """Return descriptions of the results that differ by more than roundings.

    Args:
        fused, plain: the implementations to compare.
        module: the attention of one layer.
        hidden, inner: number of columns of the residual stream and of the MLP.
    """
    cos = plain.tables["main"][0]
    differences = []
    for rows in ROWS:
        results = {ops: _results(ops, module, hidden, inner, rows, cos) for ops in (fused, plain)}
        for name, mine in results[fused].items():
            difference = (mine.float() - results[plain][name].float()).abs().max().item()
            if not difference <= TOLERANCE[cos.dtype]:
                differences.append(f"{name} of {rows} rows by {difference:.3g}")
    return differences + [
        f"tokens in {dtype}"
        for dtype in (cos.dtype, torch.float32)
        if not _same_tokens(fused, plain, cos, dtype)
    ]


def _same_tokens(fused: TorchOps, plain: TorchOps, like: Tensor, dtype: torch.dtype) -> bool:
    """Return True if both choose the same tokens, but for one at the boundary between two."""
    source = torch.Generator().manual_seed(0)
    differ = 0
    for filters in (FILTERS[:2], FILTERS):
        repeated = [*filters] * CHOICES
        logits = (3 * torch.randn(len(repeated), VOCAB, generator=source)).to(like.device, dtype)
        uniforms = torch.rand(len(repeated), generator=source).tolist()
        tokens = (ops.choose(logits, repeated, uniforms).tolist() for ops in (fused, plain))
        differ += sum(a != b for a, b in zip(*tokens, strict=True))
    return differ <= 1


def _results(
    ops: TorchOps, module: AttentionModule, hidden: int, inner: int, rows: int, like: Tensor
) -> dict[str, Tensor]:
    """Return one implementation's results for random numbers that depend on ``rows`` only."""
    source = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=source) - 0.5).to(like)

    heads = module.num_heads + 2 * module.num_kv_heads
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=source)[:rows].to(like.device)
    positions = torch.randint(len(like), (rows,), generator=source).to(like.device)
    pool = random(2, BLOCKS, BLOCK_SIZE, module.num_kv_heads, module.head_dim)
    step = ops.begin(_batch(positions, slots, RecordingAttention(pool, slots)))
    norm = RMSNorm(hidden, 1e-6)
    norm.weight.data = random(hidden)
    x, delta = random(rows, hidden), random(rows, hidden)
    return {
        "norm": step.add_norm(x, None, norm),
        "sum and norm": step.add_norm(x, delta, norm),
        "residual": x,
        "gate": step.gate_and_mul(random(rows, 2 * inner), "silu"),
        "attention": step.attend(module, random(rows, heads * module.head_dim)),
        "pool": pool,
    }


def _batch(positions: Tensor, slots: Tensor, attention: Any) -> Batch:
    """Return a batch of which only the parts that layers use are meaningful."""
    none: Sequence[int] = ()
    return Batch(
        token_ids=positions,
        positions=positions,
        query_start=positions,
        seq_lens=positions,
        block_tables=positions,
        slot_mapping=slots,
        query_lens_host=none,
        seq_lens_host=none,
        num_decodes=0,
        attention=attention,
    )
