"""Paged attention on CUDA: PyTorch's Flash Attention with block tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ullm.errors import ModelUnsupported
from ullm.model.attention.batch import Batch, BatchLayout
from ullm.model.memory.kv_pool import KvShape
from ullm.model.memory.upload import upload

FULL, CAUSAL = (-1, -1), (-1, 0)
"""Windows of keys to the left and to the right of a query; -1: unlimited."""

PagedKernel = Callable[[Tensor, Tensor, "SequenceGroup", Tensor, float, int | None], Tensor]
"""The signature of `paged_attention`."""
DecodeAttention = Callable[[Tensor, Tensor, "SequenceGroup", float, int | None], Tensor]
"""Attention of one query per sequence: queries ``[N, heads, head_dim]``, a layer's pool, the sequences,
scale, sliding window → shaped as the queries."""


class VarlenAttention:
    """Implements `ullm.model.attention.batch.AttentionBackend`.

    Attributes:
        kernel: computes attention.
        choose_decode: number of sequences → a kernel to use instead with one query per sequence, or None.

    The pool of each layer is ``[keys or values, num_blocks + 1, block_size, KV heads, head_dim]``. The extra
    block is for padding: sequences that fill up a CUDA graph's batch write and read there.
    """

    def __init__(
        self, shape: KvShape, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape, self.num_blocks, self.block_size, self.device = shape, num_blocks, block_size, device
        self.kernel: PagedKernel = paged_attention
        self.choose_decode: Callable[[int], DecodeAttention | None] | None = None
        size = (2, num_blocks + 1, block_size, shape.num_kv_heads, shape.head_dim)
        self.pools = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)]

    @property
    def padding_block(self) -> int:
        """The block of padding sequences."""
        return self.num_blocks

    def prepare(self, layout: BatchLayout) -> Batch:
        """See `AttentionBackend.prepare`; the host does not wait for the device.

        Decodes are a group of their own: with one query per sequence, the kernel reads keys and values only
        once for all query heads that share them.
        """
        decodes, starts = layout.num_decodes, layout.starts
        rest = starts[decodes:] - starts[decodes]
        numbers = (layout.token_ids, layout.positions, layout.slot_mapping, starts, rest)
        seq_lens = np.asarray(layout.seq_lens, dtype=np.int32)
        token_ids, positions, slot_mapping, query_start, rest_start, lens, block_tables = upload(
            self.device, *numbers, seq_lens, layout.block_tables
        )
        groups = [
            _group(layout, sequences, first, lens, block_tables)
            for sequences, first in (
                (slice(decodes), query_start[: decodes + 1]),
                (slice(decodes, None), rest_start),
            )
            if layout.seq_lens[sequences]
        ]
        return Batch(
            token_ids=token_ids,
            positions=positions,
            query_start=query_start,
            seq_lens=lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            query_lens_host=layout.query_lens,
            seq_lens_host=layout.seq_lens,
            num_decodes=decodes,
            attention=VarlenStep(self, slot_mapping, groups),
        )

    def block_rows(self) -> list[Tensor]:
        """See `AttentionBackend.block_rows`; the padding block is the last one."""
        return [part.view(self.num_blocks + 1, -1) for pool in self.pools for part in pool]

    def release(self) -> None:
        """Free the pool."""
        self.pools.clear()


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """Neighbouring sequences of a batch that share one call of the kernel: N sequences.

    Args:
        query_start: ``[N + 1]`` int32, index of each sequence's first query, from 0, and their number.
        seq_lens: ``[N]`` int32, KV length of each sequence.
        block_tables: ``[N, W]`` int32.
        tokens: number of queries.
        max_query_len: queries of the longest sequence.
        max_seq_len: KV length of the longest sequence, or more. The kernel splits few sequences into as many
            pieces as would keep the GPU busy at this length, so it should not be much more.
    """

    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    tokens: int
    max_query_len: int
    max_seq_len: int

    def window(self, sliding_window: int | None) -> tuple[int, int]:
        """Return the kernel's window arguments.

        A single query is the last one and sees all keys, causal or not. The kernel distinguishes the two: it
        computes query heads that share a KV head together only without any window
        (``seqlenq_ngroups_swapped`` in PyTorch's flash_api.cpp), and otherwise reads the keys once per head.
        """
        if sliding_window is not None and sliding_window < self.max_seq_len:
            return sliding_window - 1, 0
        return FULL if self.max_query_len == 1 else CAUSAL


def _group(
    layout: BatchLayout, sequences: slice, query_start: Tensor, seq_lens: Tensor, block_tables: Tensor
) -> SequenceGroup:
    """Return a group of some sequences of a batch; lengths and tables are those of the whole batch."""
    query_lens = layout.query_lens[sequences]
    return SequenceGroup(
        query_start,
        seq_lens[sequences],
        block_tables[sequences],
        tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(layout.seq_lens[sequences]),
    )


class VarlenStep:
    """Attention of one step; implements `ullm.model.attention.batch.Attend`.

    Reads its tensors when it is called, so that a CUDA graph uses their content at replay.

    Args:
        backend: the KV pool.
        slot_mapping: ``[T]`` int64, the slot of each token's KV.
        groups: the batch's sequences, in its order.
    """

    def __init__(self, backend: VarlenAttention, slot_mapping: Tensor, groups: list[SequenceGroup]) -> None:
        self.backend, self.slot_mapping, self.groups = backend, slot_mapping, groups
        self._key_starts = [torch.zeros_like(group.query_start) for group in groups]

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
        """See `Attend`.

        Raises:
            ModelUnsupported: the model caps its scores or has sinks, which the kernel cannot do.
        """
        if softcap is not None:
            raise ModelUnsupported("soft-capped attention scores are not supported on CUDA; use --device cpu")
        if sinks is not None:
            raise ModelUnsupported(
                "attention sinks are not supported on CUDA in half precision; use --device cpu"
            )
        keys, values = self.backend.pools[layer]
        keys.view(-1, *keys.shape[2:]).index_copy_(0, self.slot_mapping, k)
        values.view(-1, *values.shape[2:]).index_copy_(0, self.slot_mapping, v)
        return self.attend(layer, q, scale, sliding_window)

    def pool(self, layer: int) -> Tensor:
        """Return a layer's keys and values; see `VarlenAttention`."""
        return self.backend.pools[layer]

    def attend(self, layer: int, q: Tensor, scale: float, sliding_window: int | None) -> Tensor:
        """Compute attention over keys and values that are already in the pool."""
        if layer == 0:  # required beside seqused_k; computed here, so that a graph recomputes them
            for group, key_start in zip(self.groups, self._key_starts, strict=True):
                torch.cumsum(group.seq_lens, 0, dtype=torch.int32, out=key_start[1:])
        outputs, end = [], 0
        for group, key_start in zip(self.groups, self._key_starts, strict=True):
            start, end = end, end + group.tokens
            outputs.append(
                self._call(self.backend.pools[layer], group, key_start, q[start:end], scale, sliding_window)
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _call(
        self,
        pool: Tensor,
        group: SequenceGroup,
        key_start: Tensor,
        q: Tensor,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        if group.max_query_len == 1 and self.backend.choose_decode is not None:
            decode = self.backend.choose_decode(group.tokens)
            if decode is not None:
                return decode(q, pool, group, scale, sliding_window)
        return self.backend.kernel(q, pool, group, key_start, scale, sliding_window)


def paged_attention(
    q: Tensor,
    pool: Tensor,
    group: SequenceGroup,
    key_start: Tensor,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Attend for one group of sequences with PyTorch's Flash Attention kernel.

    This is what ``torch.nn.attention.varlen.varlen_attn`` calls, without its extras: importing a compiler
    on the first call, 1.5 s, and a kernel that fills a random generator's state on every call.

    Args:
        q: ``[tokens, query heads, head_dim]``.
        pool: one layer's pool; see `VarlenAttention`.
        key_start: ``[N + 1]`` int32, cumulative KV lengths; the kernel requires them beside ``seqused_k``.
        scale: factor of the scores.
        sliding_window: keys that a query sees, itself included; None: all before it.

    Returns:
        ``[tokens, query heads, head_dim]``.
    """
    window = group.window(sliding_window)
    out, *_ = torch.ops.aten._flash_attention_forward(
        q,
        pool[0],
        pool[1],
        group.query_start,
        key_start,
        group.max_query_len,
        group.max_seq_len,
        0.0,  # dropout
        window == CAUSAL,
        False,
        scale=scale,
        window_size_left=window[0],
        window_size_right=window[1],
        seqused_k=group.seq_lens,
        block_table=group.block_tables,
    )
    return out  # type: ignore[no-any-return]
