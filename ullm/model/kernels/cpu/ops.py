"""`LayerOps` and `AttentionBackend` on the CPU kernels: one call for several layers, or four per layer.

PyTorch needs some thirty calls per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Array, c_void_p
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ullm.model.attention.batch import Batch, BatchLayout
from ullm.model.kernels.cpu.exchange import SharedExchange
from ullm.model.kernels.cpu.kernels import (
    BlockStruct,
    CpuKernels,
    LayerStruct,
    MatrixStruct,
    StepStruct,
    matrix_struct,
)
from ullm.model.layers.layer_ops import (
    Activation,
    AttentionModule,
    LayerModule,
    LinearModule,
    MlpBlock,
    RopeTables,
    StepOps,
    layer_by_layer,
)
from ullm.model.layers.linear import RMSNorm
from ullm.model.memory.kv_pool import KvShape, lazy_zeros
from ullm.model.sampling.choose import SamplingFilter, choose_tokens

CALL_OPERATIONS = 10**10
"""Operations of one call, between two progress reports: about 20 ms of one core, beside which the call's own
5 µs do not matter."""


class KernelAttention:
    """Implements `ullm.model.attention.batch.AttentionBackend` over a pool in the kernels' own layout.

    Args:
        tile_rows: query vectors that share one pass over the keys: a KV head's, times neighbouring tokens of
            a prompt. It changes no result.
    """

    def __init__(
        self,
        shape: KvShape,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tile_rows: int,
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.tile_tokens = max(1, tile_rows * shape.num_kv_heads // shape.num_query_heads)
        keys = block_size + block_size % 2  # keys and values may be in pairs
        size = (num_blocks, 2 * shape.num_kv_heads * keys * shape.head_dim)
        self.pages = [lazy_zeros(size, dtype) for _ in range(shape.num_layers)]
        self.pointers = (c_void_p * shape.num_layers)(*(pages.data_ptr() for pages in self.pages))

    def prepare(self, layout: BatchLayout) -> Batch:
        """See `AttentionBackend.prepare`."""
        return layout.batch(KernelAttend(self, tiles(layout, self.tile_tokens)))

    def block_rows(self) -> list[Tensor]:
        """See `AttentionBackend.block_rows`."""
        return self.pages

    def release(self) -> None:
        """Free the pool."""
        self.pages.clear()
        self.pointers = (c_void_p * 0)()


class KernelAttend:
    """The attention of one step: the pool, and the tiles of queries that are computed together."""

    def __init__(self, backend: KernelAttention, tiles: npt.NDArray[np.int32]) -> None:
        self.backend, self.tiles = backend, tiles

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
        """Raise TypeError: `KernelStep.attend` computes attention, together with the rotation before it."""
        raise TypeError("only KernelStep computes attention over this pool")


def tiles(layout: BatchLayout, tokens: int) -> npt.NDArray[np.int32]:
    """Return tiles of at most ``tokens`` neighbouring tokens of a sequence.

    Returns:
        ``[n, 3]`` int32: sequence, first token, number of tokens.
    """
    starts = layout.starts
    if layout.num_decodes == len(layout.query_lens):
        return np.stack((starts[:-1], starts[:-1], np.ones_like(starts[:-1])), 1)
    counts = -(-np.asarray(layout.query_lens) // tokens)
    sequence = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[sequence] + index * tokens
    return np.stack((sequence, first, np.minimum(tokens, starts[sequence + 1] - first)), 1).astype(np.int32)


def layers_at_once(module: LayerModule, tokens: int) -> int:
    """Return how many layers one call computes: as many as take `CALL_OPERATIONS`, and at least one.

    Args:
        module: one of the layers.
        tokens: number of tokens of the step.
    """
    parts = module.self_attn, cast(MlpBlock, module.mlp)
    matrices = parts[0].qkv_proj, parts[0].o_proj, parts[1].gate_up_proj, parts[1].down_proj
    operations = 2 * tokens * sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    return max(1, CALL_OPERATIONS // operations)


def second_half(table: Tensor) -> Tensor:
    """Return a rotary table as the kernels take it, ``[positions, half of the rotated numbers]``."""
    return table[:, 0, table.shape[-1] // 2 :].contiguous()


class KernelOps:
    """Implements `LayerOps`.

    Args:
        kernels: the kernels to compute with.
        tables: see `RopeTables`, in float32.
    """

    def __init__(self, kernels: CpuKernels, tables: RopeTables) -> None:
        self.kernels = kernels
        self._tables = {rope: tuple(map(second_half, table)) for rope, table in tables.items()}
        self._layers: dict[int, LayerStruct] = {}
        self._blocks: Array[BlockStruct] | None = None
        self._biases: list[Tensor] = []
        self._weights: dict[RMSNorm, Tensor] = {}

    @property
    def name(self) -> str:
        """See `LayerOps`."""
        return self.kernels.variant

    def choose(self, logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
        """See `LayerOps`."""
        kernel = self.kernels.choose_tokens if logits.dtype == torch.float32 else choose_tokens
        return kernel(logits, filters, uniforms)

    def begin(self, batch: Batch) -> StepOps:
        """See `LayerOps`."""
        return KernelStep(self, batch)

    def weight(self, norm: RMSNorm) -> Tensor:
        """Return a norm's weight in float32."""
        if norm not in self._weights:
            self._weights[norm] = norm.weight.detach().float()
        return self._weights[norm]

    def layer(self, module: AttentionModule) -> LayerStruct:
        """Return the kernels' description of a layer's attention; made at its first step."""
        if module.layer not in self._layers:
            q_norm, k_norm = module.q_norm, module.k_norm
            cosines, sines = self._tables.get(module.rope, (None, None))
            self._layers[module.layer] = LayerStruct(
                heads=module.num_heads,
                kv_heads=module.num_kv_heads,
                head_dim=module.head_dim,
                rotary=0 if cosines is None else 2 * cosines.shape[1],
                window=module.window or 0,
                norm_heads=not module.norm_all_heads,
                scale=module.scale,
                norm_eps=q_norm.eps if q_norm is not None else 0.0,
                softcap=module.softcap or 0.0,
                cosines=None if cosines is None else cosines.data_ptr(),
                sines=None if sines is None else sines.data_ptr(),
                q_norm=None if q_norm is None else self.weight(q_norm).data_ptr(),
                k_norm=None if k_norm is None else self.weight(k_norm).data_ptr(),
            )
        return self._layers[module.layer]

    def blocks(self, modules: Sequence[LayerModule]) -> Array[BlockStruct]:
        """Return the kernels' description of all layers; made at the first step."""
        if self._blocks is None:
            self._blocks = (BlockStruct * len(modules))(*map(self.block, modules))
        return self._blocks

    def block(self, module: LayerModule) -> BlockStruct:
        """Return the kernels' description of a layer with its matrices and norms."""
        attention, mlp, norms = module.self_attn, cast(MlpBlock, module.mlp), module.norms
        pointers = [None if norm is None else self.weight(norm).data_ptr() for norm in norms]
        return BlockStruct(
            attention=self.layer(attention),
            hidden=attention.o_proj.shape[0],
            intermediate=mlp.down_proj.shape[1],
            gelu=mlp.activation == "gelu_tanh",
            qkv=self.matrix(attention.qkv_proj),
            output=self.matrix(attention.o_proj),
            gate_up=self.matrix(mlp.gate_up_proj),
            down=self.matrix(mlp.down_proj),
            attention_norm=pointers[0],
            attended_norm=pointers[1],
            mlp_norm=pointers[2],
            made_norm=pointers[3],
            eps=next(norm.eps for norm in norms if norm is not None),
            scale=module.residual_scale,
        )

    def matrix(self, module: LinearModule) -> MatrixStruct:
        """Return the kernels' description of a linear layer.

        The module keeps its weight alive, this object its bias.
        """
        assert module.packed is not None
        bias = module.local_bias()
        if bias is not None:
            bias = bias.float().contiguous()
            self._biases.append(bias)
        return matrix_struct(module.packed, bias, *module.shape)


class KernelStep:
    """Implements `StepOps`; see there."""

    def __init__(self, ops: KernelOps, batch: Batch) -> None:
        attention = cast(KernelAttend, batch.attention)
        self._ops, self._kernels, self._batch = ops, ops.kernels, batch  # the batch keeps the arrays alive
        self._attention = attention.backend
        self._struct = StepStruct(
            tokens=len(batch.token_ids),
            num_tiles=len(attention.tiles),
            table_width=batch.block_tables.shape[1],
            block_size=attention.backend.block_size,
            positions=batch.positions.data_ptr(),
            slots=batch.slot_mapping.data_ptr(),
            tables=batch.block_tables.data_ptr(),
            tiles=attention.tiles.ctypes.data,
        )

    def layers(self, modules: Sequence[LayerModule], x: Tensor, done: Callable[[], None]) -> Tensor:
        """See `StepOps`. Ranks that share no memory compute layer by layer, with sums in between; so do steps
        with adapters, which add to products."""
        exchange = modules[0].parallel.exchange
        if self._batch.adapters or not all(module.is_dense for module in modules):
            return layer_by_layer(self, modules, x, done)
        if modules[0].parallel.world_size > 1 and not isinstance(exchange, SharedExchange):
            return layer_by_layer(self, modules, x, done)
        shared = exchange if isinstance(exchange, SharedExchange) else None
        delta, blocks, pages = None, self._ops.blocks(modules), self._attention.pointers
        each = layers_at_once(modules[0], len(x))
        for first in range(0, len(modules), each):
            part = range(first, min(first + each, len(modules)))
            delta = self._kernels.decoder_layers(self._struct, blocks, part, x, delta, pages, shared)
            done()
        assert delta is not None
        return delta

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: RMSNorm | None) -> Tensor:
        """See `StepOps`."""
        weight, eps = (None, 0.0) if norm is None else (self._ops.weight(norm), norm.eps)
        return self._kernels.add_rms_norm(x, delta, weight, eps)

    def gate_and_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See `StepOps`."""
        return self._kernels.gate_and_mul(gate_up, gelu=activation == "gelu_tanh")

    def attend(self, module: AttentionModule, qkv: Tensor) -> Tensor:
        """See `StepOps`."""
        return self._kernels.attend(
            self._struct, self._ops.layer(module), qkv, self._attention.pages[module.layer]
        )
