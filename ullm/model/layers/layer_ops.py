"""Operations of a decoder layer between its matrix products, in PyTorch, and their interface.

One implementation is chosen per model. `TorchOps` is the reference for the others, and runs on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ullm.model.attention.batch import Batch
from ullm.model.layers.linear import RMSNorm
from ullm.model.layers.parallel import ParallelContext
from ullm.model.layers.rope import rotate
from ullm.model.sampling.choose import SamplingFilter, choose_tokens

Activation = Literal["silu", "gelu_tanh"]
"""What the MLP does to its gate; GELU is approximated by tanh (arXiv:1606.08415)."""
Rope = Literal["main", "local", "none"]
"""A layer's rotary embedding: layers with a sliding window may have one of their own, ``local``."""
RopeTables = Mapping[Rope, tuple[Tensor, Tensor]]
"""Cosines and sines of `ullm.model.layers.rope.rope_cache`; there is none of ``none``."""
Norms = tuple["RMSNorm | None", "RMSNorm | None", "RMSNorm | None", "RMSNorm | None"]
"""A layer's norms: before attention, of what it returns, before the MLP, of what that returns."""


class AttentionModule(Protocol):
    """One layer's attention on this rank, as `StepOps.attend` needs it.

    ``norm_all_heads``: queries, and keys, of all heads are normalised together.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    rope: Rope
    norm_all_heads: bool
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

    activation: Activation

    @property
    def gate_up_proj(self) -> LinearModule:
        """Projection to gate and up, side by side."""

    @property
    def down_proj(self) -> LinearModule:
        """Projection of the MLP's output."""


class LayerModule(Protocol):
    """A decoder layer.

    ``is_dense``: its MLP is a `MlpBlock`. ``residual_scale``: factor of what attention and MLP return.
    """

    parallel: ParallelContext
    is_dense: bool
    residual_scale: float

    @property
    def norms(self) -> Norms:
        """The layer's norms."""

    @property
    def self_attn(self) -> AttentionBlock:
        """The layer's attention."""

    @property
    def mlp(self) -> object:
        """The layer's MLP, or its experts."""

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

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: RMSNorm | None) -> Tensor:
        """Add ``delta`` to the residual stream ``x [T, hidden_size]`` in place; return its norm or it."""

    def gate_and_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """Return ``activation(gate) * up`` of ``[T, gate and up side by side]``."""

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
        tables: see `RopeTables`, in the model's dtype.
    """

    name = "PyTorch"

    def __init__(self, tables: RopeTables) -> None:
        self.tables = tables

    def choose(self, logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
        """See `LayerOps`."""
        return choose_tokens(logits, filters, uniforms)

    def begin(self, batch: Batch) -> StepOps:
        """See `LayerOps`."""
        return TorchStep(batch, self.tables)


class TorchStep:
    """Implements `StepOps`; see there."""

    def __init__(self, batch: Batch, tables: RopeTables) -> None:
        self._batch, positions = batch, batch.positions
        self._tables = {rope: (cos[positions], sin[positions]) for rope, (cos, sin) in tables.items()}
        self._dtype = tables["main"][0].dtype if tables else torch.float32  # fused kernels need neither

    def layers(self, modules: Sequence[LayerModule], x: Tensor, done: Callable[[], None]) -> Tensor:
        """See `StepOps`."""
        return layer_by_layer(self, modules, x, done)

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: RMSNorm | None) -> Tensor:
        """See `StepOps`."""
        if delta is not None:
            x.add_(delta)
        return (x if norm is None else norm.forward(x)).to(self._dtype)

    def gate_and_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See `StepOps`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")).mul_(up)

    def attend(self, module: AttentionModule, qkv: Tensor) -> Tensor:
        """See `StepOps`."""
        tokens, counts = qkv.shape[0], [module.num_heads, module.num_kv_heads]
        heads = qkv.view(tokens, -1, module.head_dim)
        qk, v = torch.split(heads, [sum(counts), module.num_kv_heads], dim=1)
        if module.q_norm is not None and module.k_norm is not None:
            q, k = torch.split(qk, counts, dim=1)
            if module.norm_all_heads:
                q, k = q.flatten(1), k.flatten(1)
            normed = module.q_norm.forward(q), module.k_norm.forward(k)
            qk = torch.cat([each.view(tokens, -1, module.head_dim) for each in normed], dim=1)
        table = self._tables.get(module.rope)
        q, k = torch.split(qk if table is None else rotate(qk, *table), counts, dim=1)
        attend = self._batch.attention
        return attend(module.layer, q, k, v, module.scale, module.window, module.softcap).view(tokens, -1)
