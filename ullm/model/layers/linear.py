"""Linear layers, embedding, head and norm, sharded for tensor parallelism.

Each layer describes by `Shard`s which slice of which checkpoint tensor goes where in its parameters, so the
loader knows nothing of sharding or packing. After loading, ``pack`` converts the weights to the layout of the
device's kernel, and ``bind`` makes the layer compute with that kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ullm.model.layers.linear_kernels import Linear, LinearKernel, pack_weight
from ullm.model.layers.lora import LoraLayer, Place
from ullm.model.layers.parallel import ParallelContext
from ullm.model.layers.quantization import Bits, QuantizedWeight
from ullm.model.layers.split import Run, run_length

SHARPENED = 8
"""Logits per row that are recomputed in float32; that costs less than finding the largest in bfloat16."""


@dataclass(frozen=True)
class Shard:
    """Slices of a checkpoint tensor and their place in a parameter, all along ``dim``.

    Args:
        target: the parameter, or the part of it that receives the slices, one after the other.
        full_shape: shape of the whole tensor in the checkpoint.
        dim: dimension that is sliced.
        runs: the slices in the checkpoint tensor; None: as much as the target holds, from the beginning.
    """

    target: Tensor | QuantizedWeight
    full_shape: tuple[int, ...]
    dim: int = 0
    runs: tuple[Run, ...] | None = None

    @property
    def slices(self) -> tuple[Run, ...]:
        """The slices: first index and length of each."""
        return ((0, self.target.shape[self.dim]),) if self.runs is None else self.runs


Shards = Iterator[tuple[str, Shard]]
"""Pairs of a name in the checkpoint and a shard of that tensor."""


def empty(*shape: int) -> nn.Parameter:
    """Return an uninitialised weight."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Loadable(nn.Module):
    """A module with weights in the checkpoint."""

    def shards(self, name: str) -> Shards:
        """Return the places of checkpoint tensors; ``name`` is the module's name in the checkpoint."""
        raise NotImplementedError


class RMSNorm(Loadable):
    """``x / sqrt(mean(x²) + eps) * (offset + weight)`` over the last dimension; replicated on all ranks.

    Args:
        offset: what checkpoints leave out of the weight, 1 with Gemma; `add_offset` adds it after loading.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = empty(size)
        self.shape, self.eps, self.offset = (size,), eps, offset

    def add_offset(self) -> None:
        """Add the offset to the weight, which is in float32 then: half precision has no 1.001."""
        if self.offset:
            self.weight.data = self.weight.data.float() + self.offset

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm, of the shape and dtype of ``x``."""
        if self.offset:
            return F.rms_norm(x.float(), self.shape, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.shape, self.weight.to(x.dtype), self.eps)

    def shards(self, name: str) -> Shards:
        """Return the whole weight."""
        yield f"{name}.weight", Shard(self.weight, self.shape)


def use_quantized_weight(module: ParallelLinear | VocabParallelHead, bits: Bits, *, as_stored: bool) -> None:
    """Replace a module's weight by one of few bits, to load into; see `QuantizedWeight`."""
    del module.weight  # torch does not allow other objects in place of a registered parameter
    module.weight = QuantizedWeight.empty(*module.shape, bits, as_stored=as_stored)


class ParallelLinear(Loadable):
    """Base of the linear layers: this rank's weight ``[out, in]`` and an optional bias."""

    weight: nn.Parameter | QuantizedWeight | None
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = empty(out_features, in_features)
        self.bias = empty(out_features) if bias else None
        self.shape = (out_features, in_features)
        self.packed: Tensor | None = None
        self.multiply: Linear | None = None
        self.lora: LoraLayer | None = None

    def pack(self, kernel: LinearKernel) -> None:
        """Convert the weight to the kernel's layout and drop the original."""
        assert self.weight is not None
        self.packed = pack_weight(kernel, self.weight)
        self.weight = None

    def bind(self, kernel: LinearKernel) -> None:
        """Compute with ``kernel``, which has packed the weight."""
        assert self.packed is not None
        self.multiply = kernel.linear(self.packed, self.local_bias(), *self.shape)

    def product(self, x: Tensor) -> Tensor:
        """Compute this rank's outputs ``[T, out]``, with the step's adapters."""
        y = self.multiply(x)  # type: ignore[misc]  # set by bind
        if self.lora is not None:
            self.lora.add(x, y)
        return y

    def lora_places(self, name: str, layer: LoraLayer) -> Iterator[tuple[str, Place]]:
        """Return the names of the checkpoint's linear layers that are here, and their places for adapters.

        Args:
            name: the module's name.
            layer: this module's adapters.
        """
        raise NotImplementedError

    def local_bias(self) -> Tensor | None:
        """Return the bias that this rank adds."""
        return self.bias.data if self.bias is not None else None


class ColumnParallelLinear(ParallelLinear):
    """Linear layers side by side, each split over the ranks along its output.

    Args:
        parts: name in the checkpoint → (all outputs, those of this rank).
    """

    def __init__(self, in_features: int, parts: dict[str, tuple[int, tuple[Run, ...]]], bias: bool) -> None:
        super().__init__(in_features, sum(run_length(own) for _, own in parts.values()), bias)
        self.in_features, self.parts = in_features, parts

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``[T, in]`` → ``[T, this rank's outputs of all parts]``."""
        return self.product(x)

    def lora_places(self, name: str, layer: LoraLayer) -> Iterator[tuple[str, Place]]:
        """Return the layers of the checkpoint that are here, for adapters."""
        prefix, offset = name.rpartition(".")[0], 0
        for part, (total, own) in self.parts.items():
            columns = slice(offset, offset + run_length(own))
            yield f"{prefix}.{part}", Place(layer, self.in_features, total, columns, outputs=own)
            offset = columns.stop

    def shards(self, name: str) -> Shards:
        """Return each part's rows."""
        prefix, offset = name.rpartition(".")[0], 0
        for part, (total, own) in self.parts.items():
            assert self.weight is not None
            rows = slice(offset, offset + run_length(own))
            yield f"{prefix}.{part}.weight", Shard(self.weight[rows], (total, self.in_features), 0, own)
            if self.bias is not None:
                yield f"{prefix}.{part}.bias", Shard(self.bias[rows], (total,), 0, own)
            offset = rows.stop


class FusedColumnParallelLinear(ColumnParallelLinear):
    """Linear layers side by side that the checkpoint has as one tensor, in the same order."""

    def lora_places(self, name: str, layer: LoraLayer) -> Iterator[tuple[str, Place]]:
        """Return the one layer of the checkpoint, for adapters."""
        runs, first = list[Run](), 0
        for total, own in self.parts.values():
            runs += [(first + start, count) for start, count in own]
            first += total
        yield name, Place(layer, self.in_features, first, slice(0, self.shape[0]), outputs=tuple(runs))

    def shards(self, name: str) -> Shards:
        """Return each part's rows of the one tensor."""
        rows, first, whole = 0, 0, sum(total for total, _ in self.parts.values())
        assert self.weight is not None
        for total, own in self.parts.values():
            runs = tuple((first + start, count) for start, count in own)
            place = slice(rows, rows + run_length(own))
            yield f"{name}.weight", Shard(self.weight[place], (whole, self.in_features), 0, runs)
            if self.bias is not None:
                yield f"{name}.bias", Shard(self.bias[place], (whole,), 0, runs)
            rows, first = place.stop, first + total


class RowParallelLinear(ParallelLinear):
    """A linear layer split over the ranks along its input; the outputs are summed over the ranks.

    Args:
        own: the inputs of this rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        parallel: ParallelContext,
        own: tuple[Run, ...],
    ) -> None:
        self.local = run_length(own)
        super().__init__(self.local, out_features, bias)
        self.full_shape, self.own = (out_features, in_features), own
        self.parallel = parallel

    def local_bias(self) -> Tensor | None:
        """Return the bias on rank 0 only, since the outputs are summed."""
        return super().local_bias() if self.parallel.rank == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``[T, this rank's inputs]`` → ``[T, out]``, the same on all ranks."""
        return self.parallel.all_reduce(self.part(x))

    def part(self, x: Tensor) -> Tensor:
        """Compute this rank's part of the sum."""
        return self.product(x)

    def lora_places(self, name: str, layer: LoraLayer) -> Iterator[tuple[str, Place]]:
        """Return the layer, for adapters."""
        outputs, inputs = self.full_shape
        yield name, Place(layer, inputs, outputs, slice(0, outputs), inputs=self.own)

    def shards(self, name: str) -> Shards:
        """Return this rank's columns, and the whole bias."""
        assert self.weight is not None
        yield f"{name}.weight", Shard(self.weight, self.full_shape, 1, self.own)
        if self.bias is not None:
            yield f"{name}.bias", Shard(self.bias, self.full_shape[:1])


class VocabParallel(Loadable):
    """Base of embedding and head: one row per token, split over the ranks. The last rank may have padding."""

    def __init__(self, vocab_size: int, hidden_size: int, parallel: ParallelContext) -> None:
        super().__init__()
        self.full_shape, self.parallel = (vocab_size, hidden_size), parallel
        self.rows = -(-vocab_size // parallel.world_size)
        self.shape = (self.rows, hidden_size)
        self.first = min(parallel.rank * self.rows, vocab_size)
        self.used = min(self.rows, vocab_size - self.first)
        self.weight: nn.Parameter | QuantizedWeight | None = empty(self.rows, hidden_size)

    def shards(self, name: str) -> Shards:
        """Return this rank's rows; none if the weight is tied to another module's."""
        if self.weight is not None:
            own = ((self.first, self.used),)
            yield f"{name}.weight", Shard(self.weight[: self.used], self.full_shape, 0, own)

    def clear_padding(self) -> None:
        """Set rows without a token to 0, since what is in memory may be no number."""
        if isinstance(self.weight, nn.Parameter):
            self.weight.data[self.used :] = 0


class VocabParallelEmbedding(VocabParallel):
    """The embedding: token ids → vectors."""

    def table(self) -> Tensor:
        """Return the weight, one row per token; it is never quantized."""
        assert isinstance(self.weight, nn.Parameter)
        return self.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """Compute ``[T]`` → ``[T, hidden_size]``, the same on all ranks."""
        table = self.table()
        if self.parallel.world_size == 1:
            return F.embedding(token_ids, table)
        local = token_ids - self.first
        elsewhere = (local < 0) | (local >= self.used)
        rows = F.embedding(local.masked_fill(elsewhere, 0), table)
        return self.parallel.all_reduce(rows.masked_fill_(elsewhere[:, None], 0))


class VocabParallelHead(VocabParallel):
    """The head: vectors → logits.

    Attributes:
        table: the weight, if the embedding keeps it too; it recomputes the largest logits. None: they stay.
        source: the module in the checkpoint whose weight the head uses; None: its own.
    """

    def __init__(self, vocab_size: int, hidden_size: int, parallel: ParallelContext) -> None:
        super().__init__(vocab_size, hidden_size, parallel)
        self.packed: Tensor | None = None
        self.multiply: Linear | None = None
        self.table: Tensor | None = None
        self.source: str | None = None

    def pack(self, kernel: LinearKernel) -> None:
        """Pack as `ParallelLinear.pack` does."""
        assert self.weight is not None
        self.packed = pack_weight(kernel, self.weight)
        self.weight = None

    def bind(self, kernel: LinearKernel) -> None:
        """Bind as `ParallelLinear.bind` does."""
        assert self.packed is not None
        self.multiply = kernel.linear(self.packed, None, self.rows, self.full_shape[1])

    def shards(self, name: str) -> Shards:
        """Return this rank's rows, under the name of ``source`` if it is set."""
        return super().shards(self.source or name)

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute ``[rows, hidden_size]`` → ``[rows, vocab_size]``, on all ranks."""
        logits = self.multiply(hidden)  # type: ignore[misc]  # set by bind
        if self.table is not None:
            logits = logits.float()
            sharpen(logits[:, : self.used], hidden, self.table)
        return self.parallel.gather_last(logits)[:, : self.full_shape[0]]


def sharpen(logits: Tensor, hidden: Tensor, table: Tensor) -> None:
    """Compute the largest of the logits ``[rows, tokens]``, which are in float32, once more, in place.

    A logit near 20 in bfloat16 is one of only 16 values per unit, so the two best tokens are often equal, and
    their ids would decide between them.
    """
    top = logits.topk(min(SHARPENED, logits.shape[1])).indices
    exact = torch.bmm(table[top].float(), hidden.float().unsqueeze(2)).squeeze(2)
    logits.scatter_(1, top, exact)
