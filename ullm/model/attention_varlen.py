"""Paged attention on CUDA: Flash Attention inside PyTorch, through ``varlen_attn`` with block tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ullm.errors import ModelUnsupported
from ullm.model.batch import Batch, KvShape, Layout


class VarlenAttention:
    """Implements `ullm.model.batch.AttentionBackend`.

    The pool of each layer is ``[keys or values, num_blocks + 1, block_size, KV heads, head_dim]``. The
    extra block is for padding: rows that fill a CUDA graph's batch write and read there.
    """

    def __init__(
        self, shape: KvShape, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape, self.num_blocks, self.block_size, self.device = shape, num_blocks, block_size, device
        from torch.nn.attention.varlen import varlen_attn  # 1.5 s and 80 MB that a CPU can do without

        self.varlen_attn: Callable[..., Any] = varlen_attn
        size = (2, num_blocks + 1, block_size, shape.num_kv_heads, shape.head_dim)
        self.pools = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)]

    @property
    def padding_block(self) -> int:
        """The block that padding rows use."""
        return self.num_blocks

    def prepare(self, layout: Layout) -> Batch:
        """See `AttentionBackend.prepare`; the copies do not wait for the device."""
        starts = np.concatenate(([0], np.cumsum(layout.query_lens))).astype(np.int32)
        batch = Batch(
            token_ids=self.to_device(layout.token_ids),
            positions=self.to_device(layout.positions),
            query_start=self.to_device(starts),
            seq_lens=self.to_device(np.asarray(layout.seq_lens, dtype=np.int32)),
            block_tables=self.to_device(layout.block_tables),
            slot_mapping=self.to_device(layout.slot_mapping),
            query_lens_host=layout.query_lens,
            seq_lens_host=layout.seq_lens,
            num_decodes=layout.num_decodes,
            attention=self.unprepared,
        )
        batch.attention = VarlenStep(self, batch, max(layout.query_lens), max(layout.seq_lens))
        return batch

    def to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        """The array as a tensor on the device, copied from pinned memory."""
        host = torch.from_numpy(array)
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def release(self) -> None:
        """Free the pool."""
        self.pools.clear()

    def unprepared(self, *_: object, **__: object) -> Tensor:
        """Stands in a batch until its attention, which needs the batch, is made."""
        raise RuntimeError("the batch's attention was called before it was prepared")


class VarlenStep:
    """Attention of one step; implements `ullm.model.batch.Attend`. Reads the batch's tensors when called,
    so that a CUDA graph sees what is in them at replay.

    Args:
        max_query_len: of any sequence in the batch.
        max_seq_len: of any sequence in the batch, or more; for a graph the context length.
    """

    def __init__(self, backend: VarlenAttention, batch: Batch, max_query_len: int, max_seq_len: int) -> None:
        self.backend, self.batch = backend, batch
        self.max_query_len, self.max_seq_len = max_query_len, max_seq_len
        self.key_start = torch.zeros_like(batch.query_start)

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `Attend`.

        Raises:
            ModelUnsupported: the model caps its scores, which the kernel cannot.
        """
        if softcap is not None:
            raise ModelUnsupported("soft-capped attention scores are not supported on CUDA; use --device cpu")
        batch, (keys, values) = self.batch, self.backend.pools[layer]
        if layer == 0:  # the kernel insists on it beside seqused_k; here, so that a graph recomputes it
            torch.cumsum(batch.seq_lens, 0, dtype=torch.int32, out=self.key_start[1:])
        keys.view(-1, *keys.shape[2:]).index_copy_(0, batch.slot_mapping, k)
        values.view(-1, *values.shape[2:]).index_copy_(0, batch.slot_mapping, v)
        out: Tensor = self.backend.varlen_attn(
            q.contiguous(),
            keys,
            values,
            batch.query_start,
            self.key_start,
            self.max_query_len,
            self.max_seq_len,
            scale=scale,
            window_size=(-1, 0) if sliding_window is None else (sliding_window - 1, 0),
            enable_gqa=q.shape[1] != keys.shape[2],
            seqused_k=batch.seq_lens,
            block_table=batch.block_tables,
        )
        return out
