"""Paged attention in plain PyTorch operations: gather the pages, then multiply.

It runs on CPUs without ullm's own kernels, and on CUDA in float32, which Flash Attention does not support.
Measured on two cores for one layer of SmolLM2 in bfloat16 with 32 sequences of 256 keys: SDPA with
``enable_gqa`` and a boolean mask 2.75 ms; here 0.07 ms to gather and 0.18 ms to multiply, because

* a page of one head is one contiguous row of the pool, so one ``index_select`` per layer puts keys and values
  of all sequences and heads into the order that two ``bmm`` need;
* query heads that share a KV head are the rows of one small matrix;
* sequences of similar length are padded to the longest of their group, and groups are formed such that
  padding never costs more than another group would.

Rows, masks and groups are computed once per step and shared by all layers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ullm.model.attention.batch import Batch, BatchLayout
from ullm.model.memory.kv_pool import KvShape, lazy_zeros

QKV = tuple[Tensor, Tensor, Tensor]
MATMUL_QUERIES = 128
"""Longest prefill chunk, in tokens, that is multiplied here; longer ones go to SDPA. Measured in bfloat16:
64 tokens take 0.09 instead of 0.15 ms, after 1000 others 0.8 instead of 1.9; with 512 both take the same."""
GROUP_COST = 1500
"""Cost of one more group of sequences, in padded keys that could be processed instead. Measured: about 40 µs
per layer, against 30 µs per 1000 keys."""


class GatherAttention:
    """Implements `ullm.model.attention.batch.AttentionBackend`.

    The pool of each layer is ``[num_blocks, keys or values, KV heads, block_size, head_dim]``: a
    block's memory is contiguous, so blocks that were never used occupy none.
    """

    def __init__(
        self, shape: KvShape, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape, self.num_blocks, self.block_size, self.device = shape, num_blocks, block_size, device
        size = (num_blocks * 2 * shape.num_kv_heads, block_size * shape.head_dim)
        pools = [
            lazy_zeros(size, dtype) if device.type == "cpu" else torch.zeros(size, dtype=dtype, device=device)
            for _ in range(shape.num_layers)
        ]
        self.pages = pools
        self.slots = [pool.view(-1, shape.head_dim) for pool in pools]

    def prepare(self, layout: BatchLayout) -> Batch:
        """See `AttentionBackend.prepare`."""
        return layout.batch(GatherStep(self, layout), self.device)

    def to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        """Return the array as a tensor on the pool's device."""
        return torch.from_numpy(array).to(self.device)

    def block_rows(self) -> list[Tensor]:
        """See `AttentionBackend.block_rows`."""
        return [pages.view(self.num_blocks, -1) for pages in self.pages]

    def release(self) -> None:
        """Free the pool."""
        self.pages.clear()
        self.slots.clear()

    def page_rows(self, tables: npt.NDArray[np.int32]) -> Tensor:
        """Return the pool's rows with the blocks of ``tables [n, W]``, ordered (k/v, KV head, n, W)."""
        heads = self.shape.num_kv_heads
        rows = np.arange(2 * heads)[:, None] + tables.reshape(1, -1).astype(np.int64) * (2 * heads)
        return self.to_device(rows.reshape(-1))


class GatherStep:
    """Attention of one step; implements `ullm.model.attention.batch.Attend`."""

    def __init__(self, backend: GatherAttention, layout: BatchLayout) -> None:
        heads, block_size = backend.shape.num_kv_heads, backend.block_size
        block, offset = np.divmod(layout.slot_mapping, block_size)
        keys = (block * (2 * heads * block_size) + offset)[:, None] + np.arange(heads) * block_size
        self.backend = backend
        self.key_slots = backend.to_device(keys)
        self.value_slots = self.key_slots + heads * block_size
        groups = length_groups(layout.seq_lens[: layout.num_decodes], GROUP_COST)
        self.parts: list[_Decodes | _Prefill] = [_Decodes(backend, layout, *group) for group in groups]
        self.parts += self.prefill_parts(layout)

    def prefill_parts(self, layout: BatchLayout) -> list[_Prefill]:
        """Return one part for each sequence with more than one query."""
        starts = layout.starts.tolist()
        sequences = range(layout.num_decodes, len(layout.seq_lens))
        return [_Prefill(self.backend, layout, i, starts[i]) for i in sequences]

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `Attend`."""
        how = _How(scale, sliding_window, softcap, sinks)
        slots, pages = self.backend.slots[layer], self.backend.pages[layer]
        slots.index_put_((self.key_slots,), k)
        slots.index_put_((self.value_slots,), v)
        if len(self.parts) == 1:
            return self.parts[0].attend(pages, (q, k, v), how).contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for part in self.parts:
            rows = slice(part.start, part.end)
            out[rows] = part.attend(pages, (q[rows], k[rows], v[rows]), how)
        return out


@dataclass(frozen=True, slots=True)
class _How:
    """What one layer's attention is like; see `Attend`."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    def softmax(self, scores: Tensor, dim: int) -> Tensor:
        """Return the weights of ``scores [KV heads, …, keys]``; query heads per KV head are at ``dim``."""
        if self.sinks is None:
            return torch.softmax(scores, -1)
        shape = [1] * scores.ndim
        shape[0], shape[dim] = scores.shape[0], scores.shape[dim]
        column = self.sinks.to(scores.dtype).view(shape).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]


class _Decodes:
    """Sequences with one query each, padded to the longest."""

    def __init__(self, backend: GatherAttention, layout: BatchLayout, start: int, end: int) -> None:
        self.start, self.end = start, end
        self.shape, self.count = backend.shape, end - start
        self.backend, self.tables = backend, layout.block_tables[start:end]
        self.lens = np.asarray(layout.seq_lens[start:end], dtype=np.int64)
        self.views: dict[int | None, tuple[Tensor, Tensor]] = {}

    def attend(self, pages: Tensor, qkv: QKV, how: _How) -> Tensor:
        """Attend for ``q [n, query heads, D]``; keys and values come from the pages."""
        q = qkv[0]
        n, heads, dim = self.count, self.shape.num_kv_heads, self.shape.head_dim
        rows, mask = self._view(how.window, q.dtype)
        keys, values = pages.index_select(0, rows).view(2, heads * n, -1, dim)
        grouped = q.view(n, heads, -1, dim).transpose(0, 1).reshape(heads * n, -1, dim)
        if how.softcap is None:
            scores = torch.baddbmm(mask, grouped, keys.transpose(1, 2), alpha=how.scale)
        else:
            scores = cap(torch.bmm(grouped, keys.transpose(1, 2)), how.scale, how.softcap).add_(mask)
        out = torch.bmm(how.softmax(scores.view(heads, n, -1, mask.shape[-1]), 2).flatten(0, 1), values)
        return out.view(heads, n, -1, dim).transpose(0, 1).reshape(n, -1, dim)

    def _view(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the pool's rows from the first block that the window reaches, and the mask to add to the
        scores, ``[KV heads * n, 1 → query heads per KV head, keys]``.

        Only a sequence's own blocks are read: what is behind the window may be another one's by now, and its
        infinities would go through a mask.
        """
        if window not in self.views:
            size, lens = self.backend.block_size, self.lens[:, None]
            seen = np.zeros_like(lens) if window is None else np.maximum(lens - window, 0)
            first, end = seen // size, -(-lens // size)
            blocks = first + np.arange((end - first).max())
            positions = (blocks[:, :, None] * size + np.arange(size)).reshape(self.count, -1)
            rows = self.backend.page_rows(np.take_along_axis(self.tables, np.minimum(blocks, end - 1), 1))
            hidden = self.backend.to_device((positions < seen) | (positions >= lens))
            heads, groups = self.shape.num_kv_heads, self.shape.num_query_heads // self.shape.num_kv_heads
            mask = minus_infinity(hidden, dtype).repeat(heads, 1).unsqueeze(1)
            self.views[window] = rows, mask.expand(-1, groups, -1)
        return self.views[window]


class _Prefill:
    """One sequence's chunk of queries, after a prefix that may already be in the pool."""

    def __init__(self, backend: GatherAttention, layout: BatchLayout, index: int, start: int) -> None:
        self.start, self.end = start, start + layout.query_lens[index]
        self.shape, self.keys = backend.shape, layout.seq_lens[index]
        self.prefix = self.keys - layout.query_lens[index]
        self.backend, self.table = backend, layout.block_tables[index : index + 1]
        self.rows: dict[int | None, Tensor] = {}
        self.masks: dict[int | None, Tensor] = {}

    def attend(self, pages: Tensor, qkv: QKV, how: _How) -> Tensor:
        """Attend for ``q [T, query heads, D]``; without a prefix, its k and v are all the keys and values."""
        q, k, v = qkv
        heads, dim, tokens = self.shape.num_kv_heads, self.shape.head_dim, q.shape[0]
        if not self.prefix:
            keys, values = k.transpose(0, 1), v.transpose(0, 1)
        else:
            stored = self.keys - self._first_key(how.window)
            rows = self._rows(how.window)
            keys, values = pages.index_select(0, rows).view(2, heads, -1, dim)[:, :, :stored]
        grouped = q.view(tokens, heads, -1, dim).permute(1, 2, 0, 3)
        if how.softcap is not None or how.sinks is not None or tokens <= MATMUL_QUERIES:
            out = self._multiply(grouped, keys, values, how)
        else:
            plain = self.prefix == 0 and (how.window is None or self.keys <= how.window)
            mask = None if plain else self._mask(how.window, q)
            keys, values = (x.unsqueeze(1).expand(-1, grouped.shape[1], -1, -1) for x in (keys, values))
            out = F.scaled_dot_product_attention(
                grouped, keys, values, mask, is_causal=plain, scale=how.scale
            )
        return out.permute(2, 0, 1, 3).reshape(tokens, -1, dim)

    def _multiply(self, q: Tensor, keys: Tensor, values: Tensor, how: _How) -> Tensor:
        """Attend for ``q [KV heads, query heads per KV head, T, D]`` over ``keys [KV heads, L, D]``."""
        rows = q.reshape(q.shape[0], -1, q.shape[3])
        scores = torch.bmm(rows, keys.transpose(1, 2))
        scores = scores.mul_(how.scale) if how.softcap is None else cap(scores, how.scale, how.softcap)
        scores = scores.view(*q.shape[:3], -1).add_(self._mask(how.window, q))
        return torch.bmm(how.softmax(scores, 1).flatten(1, 2), values).view(q.shape)

    def _first_key(self, window: int | None) -> int:
        """Return the position of the first key that is read: a block's first, which the window reaches."""
        size = self.backend.block_size
        return 0 if window is None else max(0, self.prefix + 1 - window) // size * size

    def _rows(self, window: int | None) -> Tensor:
        """Return the pool's rows with the keys from `_first_key` on."""
        if window not in self.rows:
            size = self.backend.block_size
            blocks = slice(self._first_key(window) // size, -(-self.keys // size))
            self.rows[window] = self.backend.page_rows(self.table[:, blocks])
        return self.rows[window]

    def _mask(self, window: int | None, q: Tensor) -> Tensor:
        """Return the mask to add to the scores, ``[T, keys]``: causal from the lower right corner."""
        if window not in self.masks:
            queries = torch.arange(self.prefix, self.keys, device=q.device)[:, None]
            keys = torch.arange(self._first_key(window), self.keys, device=q.device)
            hidden = keys > queries
            if window is not None:
                hidden |= keys <= queries - window
            self.masks[window] = minus_infinity(hidden, q.dtype)
        return self.masks[window]


def minus_infinity(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that removes ``hidden`` scores when it is added to them."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def cap(scores: Tensor, scale: float, softcap: float) -> Tensor:
    """Apply Gemma 2's soft cap in place: ``softcap * tanh(scores * scale / softcap)``."""
    return scores.mul_(scale / softcap).tanh_().mul_(softcap)


def length_groups(lens: list[int], group_cost: int) -> list[tuple[int, int]]:
    """Split sequences, longest first, into ranges ``[start, end)`` that are padded together.

    A new group begins where padding all following sequences to the current group's longest would cost more
    than ``group_cost`` keys.
    """
    starts: list[int] = []
    for i, length in enumerate(lens):
        if not starts or (lens[starts[-1]] - length) * (len(lens) - i) > group_cost:
            starts.append(i)
    return list(itertools.pairwise([*starts, len(lens)]))
