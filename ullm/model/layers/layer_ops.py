"""What a decoder layer does between its matrix products: in PyTorch, or in the CPU's own kernels.

Chosen once per model. `TorchOps` is the reference for the others, and what runs on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ullm.model.attention.batch import Batch
from ullm.model.layers.linear import RMSNorm
from ullm.model.layers.rope import rotate
from ullm.model.sampling.choose import SamplingFilter, choose_tokens


class AttentionModule(Protocol):
    """What `StepOps.attend` needs to know of one layer's attention on this rank."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None


class LinearModule(Protocol):
    """A linear layer whose weight is packed, on this rank."""

    packed: Tensor | None
    shape: tuple[int, int]

    def local_bias(self) -> Tensor | None:
        """The bias that this rank adds."""


class AttentionBlock(AttentionModule, Protocol):
    """Attention with its linear layers."""

    @property
    def qkv_proj(self) -> LinearModule:
        """Queries, keys and values side by side."""

    @property
    def o_proj(self) -> LinearModule:
        """The output."""


class MlpBlock(Protocol):
    """A gated MLP."""

    @property
    def gate_up_proj(self) -> LinearModule:
        """Gate and up side by side."""

    @property
    def down_proj(self) -> LinearModule:
        """The output."""


class LayerModule(Protocol):
    """A decoder layer."""

    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm
    world_size: int

    @property
    def self_attn(self) -> AttentionBlock:
        """Its attention."""

    @property
    def mlp(self) -> MlpBlock:
        """Its MLP."""

    def forward(self, x: Tensor, delta: Tensor | None, step: StepOps) -> Tensor:
        """Add ``delta``, what the layer before has left to add, and the attention to the residual stream
        ``x [T, hidden_size]`` in place; returns what is to be added next."""


class StepOps(Protocol):
    """The layers, and the three things between its matrix products, for one step's batch. T tokens."""

    def layers(self, modules: Sequence[LayerModule], x: Tensor, done: Callable[[], None]) -> Tensor:
        """All layers in succession; each adds to the residual stream ``x [T, hidden_size]`` in place.

        Args:
            done: called after each layer, or after several that take little time; a sign of life.

        Returns:
            what the last one has left to be added.
        """

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: RMSNorm) -> Tensor:
        """Add ``delta`` to the residual stream ``x [T, hidden_size]`` in place; returns its norm."""

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of ``[T, gate and up side by side]``."""

    def attend(self, module: AttentionModule, qkv: Tensor) -> Tensor:
        """Normalise and rotate queries and keys, store keys and values, attend.

        Args:
            qkv: ``[T, (query heads + 2 * KV heads) * head_dim]``; may be overwritten.

        Returns:
            ``[T, query heads * head_dim]``.
        """


def layer_by_layer(
    step: StepOps, modules: Sequence[LayerModule], x: Tensor, done: Callable[[], None]
) -> Tensor:
    """`StepOps.layers` for layers that call ``step`` for what is between their matrix products."""
    delta: Tensor | None = None
    for module in modules:
        delta = module.forward(x, delta, step)
        done()
    assert delta is not None
    return delta


class LayerOps(Protocol):
    """One implementation of `StepOps`, for all steps of a model."""

    def choose(self, logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
        """See `ullm.model.sampling.choose.choose_tokens`."""

    def begin(self, batch: Batch) -> StepOps:
        """Prepare what all layers of a step share."""


class TorchOps:
    """Implements `LayerOps` on any device.

    Args:
        cos, sin: of `ullm.model.layers.rope.rope_cache`.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.tables = cos, sin

    def choose(self, logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
        """See `LayerOps`."""
        return choose_tokens(logits, filters, uniforms)

    def begin(self, batch: Batch) -> StepOps:
        """See `LayerOps`."""
        cos, sin = self.tables
        return TorchStep(batch, cos[batch.positions], sin[batch.positions])


class TorchStep:
    """Implements `StepOps`; see there."""

    def __init__(self, batch: Batch, cos: Tensor, sin: Tensor) -> None:
        self._batch, self._cos, self._sin = batch, cos, sin

    def layers(self, modules: Sequence[LayerModule], x: Tensor, done: Callable[[], None]) -> Tensor:
        """See `StepOps`."""
        return layer_by_layer(self, modules, x, done)

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: RMSNorm) -> Tensor:
        """See `StepOps`."""
        if delta is not None:
            x.add_(delta)
        return norm.forward(x)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See `StepOps`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def attend(self, module: AttentionModule, qkv: Tensor) -> Tensor:
        """See `StepOps`."""
        tokens, counts = qkv.shape[0], [module.num_heads, module.num_kv_heads]
        heads = qkv.view(tokens, -1, module.head_dim)
        qk, v = torch.split(heads, [sum(counts), module.num_kv_heads], dim=1)
        if module.q_norm is not None and module.k_norm is not None:
            q, k = torch.split(qk, counts, dim=1)
            qk = torch.cat((module.q_norm.forward(q), module.k_norm.forward(k)), dim=1)
        q, k = torch.split(rotate(qk, self._cos, self._sin), counts, dim=1)
        return self._batch.attention(module.layer, q, k, v, module.scale, module.window).view(tokens, -1)
