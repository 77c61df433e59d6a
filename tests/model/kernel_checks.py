"""Checks of decode attention and of token choice against plain PyTorch, on a GPU or interpreted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.model.fake_cuda import attend
from ullm.model.attention.varlen import FULL
from ullm.model.layers.layer_ops import RopeTables
from ullm.model.layers.linear import RMSNorm
from ullm.model.layers.rope import rope_cache
from ullm.model.sampling.choose import choose_tokens, uniform


class PlainDecode:
    """Stands in for `ullm.model.kernels.cuda.decode`; splitting into pieces does not change the result."""

    TILINGS = (SimpleNamespace(keys=64), SimpleNamespace(keys=128))

    def __init__(self) -> None:
        self.splits: list[int] = []

    def choose_splits(self, count: int, kv_heads: int, processors: int, longest: int, tile: int) -> int:
        return 1

    def decode_attention(
        self, q: Tensor, pool: Tensor, seq_lens: Tensor, block_tables: Tensor, *,
        scale: float, window: int, splits: int, tiling: Any,
    ) -> Tensor:  # fmt: skip
        self.splits.append(splits)
        out = torch.empty_like(q)
        for i, length in enumerate(seq_lens.tolist()):
            k, v = (half[block_tables[i].long()].flatten(0, 1)[:length].float() for half in pool)
            sides = (window - 1, 0) if window else FULL
            out[i] = attend(q[i, None].float(), k, v, scale, sides)[0].to(q.dtype)
        return out


def check_decode(
    kernels: Any, tiling: Any, kv_heads: int, group: int, size: int, page: int, dtype: torch.dtype,
    window: int, splits: int,
) -> None:  # fmt: skip
    """Compare a kernel with `PlainDecode`, for sequences of several lengths and sliced queries."""
    torch.manual_seed(0)
    lens = torch.tensor([1, 17, 40, 64, 5], dtype=torch.int32)
    width = -(-64 // page)
    pool = torch.randn(2, 24, page, kv_heads, size).to(dtype)
    block_tables = torch.randint(24, (len(lens), width), dtype=torch.int32)
    q = torch.randn(len(lens), kv_heads * group + 2, size).to(dtype)[:, : kv_heads * group]
    arguments = (q, pool, lens, block_tables)
    options: dict[str, Any] = {"scale": size**-0.5, "window": window, "splits": splits, "tiling": tiling}
    found = kernels.decode_attention(*arguments, **options)
    expected = PlainDecode().decode_attention(*arguments, **options)
    tolerance = 1e-4 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def check_choice(choose: Any, dtype: torch.dtype) -> None:
    """Compare tokens with PyTorch's: all filters, impossible and equally likely tokens, extreme numbers."""
    filters = [
        *((0, 0, 1, 0), (0.6, 0, 1, 0), (1, 0, 0.9, 0), (1, 20, 1, 0), (1.3, 50, 0.5, 0)),
        *((0.8, 0, 1, 0.05), (0.7, 5, 0.95, 0.02), (1e-20, 0, 1, 0), (5, 0, 0.3, 0), (0, 3, 0.5, 0)),
    ]
    torch.manual_seed(0)
    for case in range(4):
        logits = (3 * torch.randn(len(filters), 300)).to(dtype)
        uniforms = [uniform(case, row) for row in range(len(filters))]
        if case == 1:
            logits[:, 5:150] = -torch.inf
        if case == 2:
            logits[:] = 1
        if case == 3:
            uniforms = [1 - 2**-53] * len(filters)
        assert torch.equal(choose(logits, filters, uniforms), choose_tokens(logits, filters, uniforms)), case


def tables(size: int, dtype: torch.dtype = torch.float32) -> RopeTables:
    """Return the tables of a rotary embedding for 64 positions."""
    cos, sin = rope_cache({"rope_type": "default", "rope_theta": 10000.0}, size, 64)
    return {"main": (cos.to(dtype), sin.to(dtype))}


def attention(heads: int, kv_heads: int, size: int, norm: bool, dtype: torch.dtype = torch.float32) -> Any:
    """Return one layer's attention."""
    norms = [RMSNorm(size, 1e-6) if norm else None for _ in range(2)]
    torch.manual_seed(3)
    for each in norms:
        if each is not None:
            each.weight.data = torch.rand(size).to(dtype)
    return SimpleNamespace(
        layer=0, num_heads=heads, num_kv_heads=kv_heads, head_dim=size, scale=1.0, window=None,
        softcap=None, rope="main", norm_all_heads=False,
        q_norm=norms[0], k_norm=norms[1],
    )  # fmt: skip
