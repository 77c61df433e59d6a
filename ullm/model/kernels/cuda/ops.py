"""`LayerOps` on Triton kernels, which are used only if they agree with PyTorch on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from ullm.errors import one_line
from ullm.logs import get_logger
from ullm.model.attention.batch import Batch
from ullm.model.kernels.cuda.check import disagreements
from ullm.model.layers.layer_ops import (
    Activation,
    AttentionModule,
    RopeTables,
    StepOps,
    TorchOps,
    TorchStep,
)
from ullm.model.layers.linear import RMSNorm
from ullm.model.sampling.choose import ChooseTokens, SamplingFilter

log = get_logger(__name__)


class PagedAttend(Protocol):
    """The part of `ullm.model.attention.varlen.VarlenStep` that fused kernels use."""

    slot_mapping: Tensor

    def pool(self, layer: int) -> Tensor:
        """Return a layer's pool, ``[keys or values, blocks, block size, KV heads, head_dim]``."""

    def attend(self, layer: int, q: Tensor, scale: float, sliding_window: int | None) -> Tensor:
        """Compute attention over keys and values that are already in the pool."""


class FusedKernels(Protocol):
    """The functions of `ullm.model.kernels.cuda.kernels`."""

    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]
    rotate_and_store: Callable[..., Tensor]


class FusedOps(TorchOps):
    """Implements `LayerOps` for batches of `VarlenAttention`.

    Args:
        tables: see `TorchOps`; all layers have the main one.
        kernels: the layers' kernels.
        choose_kernel: chooses tokens; see `ullm.model.sampling.choose.choose_tokens`.
    """

    name = "Triton"

    def __init__(self, tables: RopeTables, kernels: FusedKernels, choose_kernel: ChooseTokens) -> None:
        super().__init__(tables)
        self.kernels, self._choose = kernels, choose_kernel

    def choose(self, logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
        """See `LayerOps`."""
        return self._choose(logits, filters, uniforms)

    def begin(self, batch: Batch) -> StepOps:
        """See `LayerOps`."""
        return FusedStep(batch, self)


class FusedStep(TorchStep):
    """Implements `StepOps`."""

    def __init__(self, batch: Batch, ops: FusedOps) -> None:
        super().__init__(batch, {})
        self._kernels, self._main = ops.kernels, ops.tables["main"]

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: RMSNorm | None) -> Tensor:
        """See `StepOps`."""
        assert norm is not None  # see `DecoderConfig.fuses`
        return self._kernels.add_norm(x, delta, norm.weight, norm.eps)

    def gate_and_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See `StepOps`."""
        return self._kernels.silu_and_mul(gate_up)

    def attend(self, module: AttentionModule, qkv: Tensor) -> Tensor:
        """See `StepOps`."""
        attention = cast(PagedAttend, self._batch.attention)
        norms, eps = None, 0.0
        if module.q_norm is not None and module.k_norm is not None:
            norms, eps = (module.q_norm.weight, module.k_norm.weight), module.q_norm.eps
        pool = attention.pool(module.layer)
        slots, positions = attention.slot_mapping, self._batch.positions
        q = self._kernels.rotate_and_store(qkv, pool, slots, positions, self._main, norms, eps)
        return attention.attend(module.layer, q, module.scale, module.window).view(len(qkv), -1)


def choose_ops(tables: RopeTables, module: AttentionModule, hidden: int, inner: int) -> TorchOps:
    """Return fused operations if they can be compiled and agree with PyTorch's, else PyTorch's.

    Args:
        tables: see `TorchOps`, on the model's device.
        module: the attention of one layer.
        hidden, inner: number of columns of the residual stream and of the MLP, on this rank.
    """
    plain = TorchOps(tables)
    try:
        kernels = cast(FusedKernels, import_module("ullm.model.kernels.cuda.kernels"))
        choose = cast(ChooseTokens, import_module("ullm.model.kernels.cuda.choose").choose_tokens)
        fused = FusedOps(tables, kernels, choose)
        differences = disagreements(fused, plain, module, hidden, inner)
    except Exception as error:  # no Triton, no C compiler, or whatever its compiler raises
        log.warning("layers are computed without fused kernels", reason=one_line(error))
        return plain
    if differences:
        log.warning("fused kernels disagree with PyTorch and are not used", where=differences)
        return plain
    return fused
