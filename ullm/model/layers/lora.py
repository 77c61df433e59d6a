"""Low-rank adapters (LoRA, arXiv:2106.09685) beside the linear layers of a model, several in one step.

An adapter adds ``scale * B(A(x))`` to the output of a linear layer, for those rows of the step that belong to
its sequences. Both products are computed by the kernel that multiplies by the model's own weights, with the
scale folded into B; so the base may be quantized, and what a row gets does not depend on the rows beside it
where that holds for the base.

With tensor parallelism a rank has the rows of B that its outputs need, or the columns of A that its inputs
need; in the latter case the sum over the ranks, which the base layer's outputs need anyway, completes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ullm.model.attention.batch import AdapterRows
from ullm.model.layers.linear_kernels import Linear, LinearKernel
from ullm.model.layers.split import Run

RANK_MULTIPLE = 16
"""The rank is padded to a multiple of this by zeros: the CPU kernels work on vectors of sixteen."""


@dataclass(frozen=True)
class Delta:
    """One adapter's part in one linear layer.

    Args:
        columns: the outputs that it adds to.
        down: the product with A; ``up`` that with ``scale * B``.
        nbytes: bytes of both.
    """

    columns: slice
    down: Linear
    up: Linear
    nbytes: int


class LoraLayer:
    """The adapters of one linear layer of the model."""

    def __init__(self, host: LoraHost) -> None:
        self._host = host
        self.deltas: dict[int, list[Delta]] = {}

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the step's adapters to the layer's outputs.

        Args:
            x: inputs, ``[T, in]``.
            y: outputs, ``[T, out]``; changed in place.
        """
        for number, rows in self._host.groups:
            deltas = self.deltas.get(number)
            if deltas is None:
                continue
            own = x[rows]
            for delta in deltas:
                more = delta.up(delta.down(own).to(own.dtype)).to(y.dtype)
                if isinstance(rows, slice):
                    y[rows, delta.columns] += more
                else:
                    y[:, delta.columns].index_add_(0, rows, more)


@dataclass(frozen=True)
class Place:
    """A linear layer as the checkpoint names it, within this rank's model.

    Args:
        layer: the module's adapters; modules may hold several of the checkpoint's layers side by side.
        in_features, out_features: of the whole layer.
        columns: the module's outputs that are this layer's.
        inputs, outputs: the runs of the whole layer's inputs and outputs that this rank has; None: all.
    """

    layer: LoraLayer
    in_features: int
    out_features: int
    columns: slice
    inputs: tuple[Run, ...] | None = None
    outputs: tuple[Run, ...] | None = None


@dataclass
class LoraHost:
    """What a model offers to adapters.

    Args:
        kernel: computes the model's linear layers.
        dtype: dtype of the inputs of linear layers.
        device: where the model is.
        places: the checkpoint's name of each linear layer → its place.
        groups: the adapters of the step that is being computed.
    """

    kernel: LinearKernel
    dtype: torch.dtype
    device: torch.device
    places: dict[str, Place] = field(default_factory=dict)
    groups: Sequence[AdapterRows] = ()

    def attach(self, number: int, name: str, a: Tensor, b: Tensor, scale: float) -> int:
        """Add an adapter's part to a layer.

        Args:
            number: the adapter's.
            name: of the layer, one of ``places``.
            a: ``[rank, in_features]``.
            b: ``[out_features, rank]``.
            scale: factor of the product.

        Returns:
            Bytes that it takes.
        """
        place = self.places[name]
        a, b = _part(a.float(), 1, place.inputs), _part(b.float() * scale, 0, place.outputs)
        rank = -(-a.shape[0] // RANK_MULTIPLE) * RANK_MULTIPLE
        down, up = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
        down[: a.shape[0]], up[:, : b.shape[1]] = a, b
        delta = Delta(place.columns, self._linear(down), self._linear(up), self.nbytes(down, up))
        place.layer.deltas.setdefault(number, []).append(delta)
        return delta.nbytes

    def detach(self, number: int) -> None:
        """Drop an adapter from all layers."""
        for place in self.places.values():
            place.layer.deltas.pop(number, None)

    def nbytes(self, *weights: Tensor) -> int:
        """Return the bytes of weights in the model's dtype."""
        return sum(weight.numel() for weight in weights) * self.dtype.itemsize

    def _linear(self, weight: Tensor) -> Linear:
        packed = self.kernel.pack(weight.to(self.device, self.dtype))
        return self.kernel.linear(packed, None, *weight.shape)


@runtime_checkable
class AdaptableModel(Protocol):
    """A model whose linear layers take adapters."""

    def lora(self) -> LoraHost:
        """Return the model's linear layers as adapters see them; one object, made when it is first needed."""


def _part(weight: Tensor, dim: int, runs: tuple[Run, ...] | None) -> Tensor:
    return weight if runs is None else torch.cat([weight.narrow(dim, *run) for run in runs], dim)
