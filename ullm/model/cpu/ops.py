"""`LayerOps` by the CPU's own kernels: four calls per layer instead of some thirty."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ullm.model.attention_gather import GatherAttention, GatherStep
from ullm.model.batch import Batch, KvShape, Layout
from ullm.model.cpu.kernels import LANES, MAX_GROUP, Kernels, LayerStruct, StepStruct, load_kernels
from ullm.model.layers import RMSNorm
from ullm.model.ops import AttentionModule, StepOps


class KernelAttention(GatherAttention):
    """The same pool as its base; sequences of one query are left to the kernels."""

    def prepare(self, layout: Layout) -> Batch:
        """See `AttentionBackend.prepare`."""
        return self.batch(layout, KernelAttend(self, layout))


class KernelAttend(GatherStep):
    """The part of a step's attention that is not the kernels': prefill chunks."""

    def __init__(self, backend: KernelAttention, layout: Layout) -> None:
        self.backend = backend
        self.prefills = self.prefill_parts(layout)
        self.struct = StepStruct(tokens=len(layout.token_ids), decodes=layout.num_decodes)


class KernelOps:
    """Implements `LayerOps`.

    Args:
        cos, sin: of `ullm.model.rope.rope_cache`, in float32.
    """

    def __init__(self, kernels: Kernels, cos: Tensor, sin: Tensor) -> None:
        half = cos.shape[-1] // 2
        self.kernels = kernels
        self._cosines = cos[:, 0, half:].contiguous()
        self._sines = sin[:, 0, half:].contiguous()
        self._layers: dict[int, LayerStruct] = {}
        self._weights: dict[RMSNorm, Tensor] = {}

    def begin(self, batch: Batch) -> StepOps:
        """See `LayerOps`."""
        return KernelStep(self, batch)

    def weight(self, norm: RMSNorm) -> Tensor:
        """A norm's weight in float32."""
        if norm not in self._weights:
            self._weights[norm] = norm.weight.detach().float()
        return self._weights[norm]

    def layer(self, module: AttentionModule) -> LayerStruct:
        """What the kernels must know of a layer; made at its first step."""
        if module.layer not in self._layers:
            q_norm, k_norm = module.q_norm, module.k_norm
            self._layers[module.layer] = LayerStruct(
                heads=module.num_heads,
                kv_heads=module.num_kv_heads,
                head_dim=module.head_dim,
                window=module.window or 0,
                scale=module.scale,
                norm_eps=q_norm.eps if q_norm is not None else 0.0,
                cosines=self._cosines.data_ptr(),
                sines=self._sines.data_ptr(),
                q_norm=None if q_norm is None else self.weight(q_norm).data_ptr(),
                k_norm=None if k_norm is None else self.weight(k_norm).data_ptr(),
            )
        return self._layers[module.layer]


def kernel_ops(shape: KvShape, dtype: torch.dtype, cos: Tensor, sin: Tensor) -> KernelOps | None:
    """`KernelOps` for a model, where they fit its shape and the kernels can be had."""
    if shape.head_dim % LANES or shape.num_query_heads > MAX_GROUP * shape.num_kv_heads:
        return None
    kernels = load_kernels(dtype)
    return None if kernels is None else KernelOps(kernels, cos, sin)


class KernelStep:
    """Implements `StepOps`; see there."""

    def __init__(self, ops: KernelOps, batch: Batch) -> None:
        self._ops, self._kernels, self._batch = ops, ops.kernels, batch  # the batch owns the arrays
        self._attention = cast(KernelAttend, batch.attention)
        self._pages = self._attention.backend.pages
        self._struct = self._attention.struct
        self._struct.table_width = batch.block_tables.shape[1]
        self._struct.block_size = self._attention.backend.block_size
        self._struct.positions = batch.positions.data_ptr()
        self._struct.slots = batch.slot_mapping.data_ptr()
        self._struct.tables = batch.block_tables.data_ptr()
        self._struct.lens = batch.seq_lens.data_ptr()

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: RMSNorm) -> Tensor:
        """See `StepOps`."""
        return self._kernels.add_rms_norm(x, delta, self._ops.weight(norm), norm.eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See `StepOps`."""
        return self._kernels.silu_and_mul(gate_up)

    def attend(self, module: AttentionModule, qkv: Tensor) -> Tensor:
        """See `StepOps`."""
        pages = self._pages[module.layer]
        out = self._kernels.attend(self._struct, self._ops.layer(module), qkv, pages)
        if self._attention.prefills:
            self._attend_prefills(module, qkv, pages, out)
        return out

    def _attend_prefills(self, module: AttentionModule, qkv: Tensor, pages: Tensor, out: Tensor) -> None:
        heads = qkv.view(qkv.shape[0], -1, module.head_dim)
        counts = [module.num_heads, module.num_kv_heads, module.num_kv_heads]
        q, k, v = torch.split(heads, counts, dim=1)
        by_head = out.view(out.shape[0], module.num_heads, module.head_dim)
        for part in self._attention.prefills:
            rows = slice(part.start, part.end)
            chunk = (q[rows], k[rows], v[rows])
            by_head[rows] = part.attend(pages, chunk, module.scale, module.window, None)
