"""Operations of a decoder layer between its matrix products, in PyTorch, and their interface.

One implementation is chosen per model. `TorchOps` is the reference for the others, and runs on any device.
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
    """One layer's attention on this rank, as `StepOps.attend` needs it."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None


class LinearModule(Protocol):
    """A linear layer with a packed weight, on this rank."""

    packed: Tensor | None
    shape: tuple[int, int]

    def local_bias(self) -> Tensor | None:
        """Return the bias that this rank adds."""


class AttentionBlock(AttentionModule, Protocol):
    """Attention with its linear layers."""

    @property
    def qkv_proj(self) -> LinearModule:
        """Projection to queries, keys and values, side by side."""

    @property
    def o_proj(self) -> LinearModule:
        """Projection of the attention's output."""


class MlpBlock(Protocol):
    """A gated MLP."""

    @property
    def gate_up_proj(self) -> LinearModule:
        """Projection to gate and up, side by side."""

    @property
    def down_proj(self) -> LinearModule:
        """Projection of the MLP's output."""


class LayerModule(Protocol):
    """A decoder layer."""

    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm
    world_size: int

    @property
    def self_attn(self) -> AttentionBlock:
        """The layer's attention."""

    @property
    def mlp(self) -> MlpBlock:
        """The layer's MLP."""

    def forward(self, x: Tensor, delta: Tensor | None, step: StepOps) -> Tensor:
        """Add ``delta``, the previous layer's MLP output, and the attention's output to the residual stream
        ``x [T, hidden_size]`` in place; return the MLP's output, which the next layer adds."""


class StepOps(Protocol):
    """The layers, and the operations between their matrix products, for one step's batch of T tokens."""

    def layers(self, modules: Sequence[LayerModule], x: Tensor, done: Callable[[], None]) -> Tensor:
        """Compute all layers in succession; each adds to the residual stream ``x [T, hidden_size]`` in place.

        Args:
            done: called after each layer, or after several quick ones, to report progress.

        Returns:
            The last layer's MLP output, which is still to be added.
        """

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: RMSNorm) -> Tensor:
        """Add ``delta`` to the residual stream ``x [T, hidden_size]`` in place; return its norm."""

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """Return ``silu(gate) * up`` of ``[T, gate and up side by side]``."""

    def attend(self, module: AttentionModule, qkv: Tensor) -> Tensor:
        """Normalise and rotate queries and keys, store keys and values, compute attention.

        Args:
            qkv: ``[T, (query heads + 2 * KV heads) * head_dim]``; may be overwritten.

        Returns:
            ``[T, query heads * head_dim]``.
        """


def layer_by_layer(
    step: StepOps, modules: Sequence[LayerModule], x: Tensor, done: Callable[[], None]
) -> Tensor:
    """Implement `StepOps.layers` by layers that call ``step`` between their matrix products."""
    delta: Tensor | None = None
    for module in modules:
        delta = module.forward(x, delta, step)
        done()
    assert delta is not None
    return delta


class LayerOps(Protocol):
    """Makes the `StepOps` of each step of a model."""

    @property
    def name(self) -> str:
        """What computes, as users are told: see `ullm.protocol.messages.ModelInfo.kernels`."""

    def choose(self, logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
        """See `ullm.model.sampling.choose.choose_tokens`."""

    def begin(self, batch: Batch) -> StepOps:
        """Prepare whatever all layers of a step share."""


class TorchOps:
    """Implements `LayerOps` on any device.

    Args:
        cos, sin: tables of `ullm.model.layers.rope.rope_cache`.
    """

    name = "PyTorch"

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
