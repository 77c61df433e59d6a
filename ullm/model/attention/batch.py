"""A step's input to a model: flattened tokens without padding, and the places of their keys and values.

The interface between runner, model and batch:

* ``hidden = model.forward(batch.token_ids, batch)`` — ``[T]`` → ``[T, hidden_size]``;
* ``logits = model.logits(hidden[rows])`` — ``[rows, hidden_size]`` → ``[rows, vocab_size]``;
* in each layer the model calls ``batch.attention(layer, q, k, v, scale)``, which stores k and v in the paged
  pool and computes causal attention of every query over its own sequence's keys.

Token t of the batch belongs to the sequence i with ``query_start[i] <= t < query_start[i + 1]``. The first
``num_decodes`` sequences have exactly one query token each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ullm.model.memory.kv_pool import KvShape
from ullm.model.sampling.choose import SamplingFilter

AdapterRows = tuple[int, Tensor | slice]
"""An adapter's number, and the rows of the step that it applies to: a slice or int64 indices."""


class Attend(Protocol):
    """Attention over the paged KV pool for one step."""

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
        """Store ``k`` and ``v``, then compute attention.

        Args:
            layer: index of the layer, from 0.
            q: ``[T, query heads of this rank, head_dim]``, already rotated.
            k: ``[T, KV heads of this rank, head_dim]``, already rotated.
            v: values, shaped as ``k``.
            scale: factor of the scores, usually ``head_dim ** -0.5``.
            sliding_window: keys that a query sees, itself included; None: all before it.
            softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
            sinks: ``[query heads]``, a score of each head that takes part in the softmax and has no value
                (arXiv:2309.17453; GPT-OSS).

        Returns:
            ``[T, query heads, head_dim]``, contiguous.
        """


def no_progress() -> None:
    """Report no progress."""


@dataclass(slots=True)
class Batch:
    """A step's tokens and the sequences that they belong to: T tokens, N sequences.

    Args:
        token_ids: ``[T]`` int64.
        positions: ``[T]`` int64, position of each token in its sequence, from 0.
        query_start: ``[N + 1]`` int32, index of the first token of each sequence, and T.
        seq_lens: ``[N]`` int32, KV length of each sequence after this step, cached tokens included.
        block_tables: ``[N, W]`` int32, block ids of each sequence, padded with 0.
        slot_mapping: ``[T]`` int64, the slot of each token's KV: ``block_id * block_size + offset``.
        query_lens_host: number of query tokens of each sequence, as Python numbers.
        seq_lens_host: ``seq_lens`` as Python numbers.
        num_decodes: number of leading sequences with one query token.
        attention: attention over this batch's sequences.
        layer_done: called after each layer, or after a few quick ones, to report progress.
        adapters: the adapters of this step, and the rows that each applies to.
    """

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    query_lens_host: Sequence[int]
    seq_lens_host: Sequence[int]
    num_decodes: int
    attention: Attend
    layer_done: Callable[[], None] = no_progress
    adapters: tuple[AdapterRows, ...] = ()


class CausalModel(Protocol):
    """The runner's interface to a model. Native models are modules; others wrap one of transformers."""

    @property
    def kv_shape(self) -> KvShape:
        """Shape of the keys and values that the KV pool must hold."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic, and of KV."""

    def forward(self, token_ids: Tensor, batch: Batch) -> Tensor:
        """Compute ``[T]`` token ids → ``[T, hidden_size]`` after the final norm."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute ``[rows, hidden_size]`` → ``[rows, vocab_size]``, the whole vocabulary on every rank."""

    def choose(self, logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
        """Return one token per row of `logits`' result; see `ullm.model.sampling.choose.choose_tokens`."""

    def tensors(self) -> Iterable[Tensor]:
        """Return all tensors that stay on the device, above all weights. Shared memory may come twice."""

    def num_parameters(self) -> int:
        """Return the number of parameters of the whole model; tied weights count once."""

    def weight_bytes(self) -> int:
        """Return the bytes of weights that this rank holds."""

    def weight_formats(self) -> tuple[str, ...]:
        """Return what the weights are in: names of dtypes, ``int8``, ``int4``."""


@dataclass
class BatchLayout:
    """A batch as the runner lays it out on the host: the arrays of `Batch`, in numpy."""

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    query_lens: list[int]
    seq_lens: list[int]
    block_tables: npt.NDArray[np.int32]
    slot_mapping: npt.NDArray[np.int64]
    num_decodes: int

    @cached_property
    def starts(self) -> npt.NDArray[np.int32]:
        """Index of the first token of each sequence, and the number of tokens, ``[N + 1]``."""
        if self.num_decodes == len(self.query_lens):
            return np.arange(len(self.query_lens) + 1, dtype=np.int32)
        return np.concatenate(([0], np.cumsum(self.query_lens))).astype(np.int32)

    def batch(self, attention: Attend, device: torch.device | str = "cpu") -> Batch:
        """Return the batch on a device, with its attention."""

        def tensor(array: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return Batch(
            token_ids=tensor(self.token_ids),
            positions=tensor(self.positions),
            query_start=tensor(self.starts),
            seq_lens=tensor(np.asarray(self.seq_lens, dtype=np.int32)),
            block_tables=tensor(self.block_tables),
            slot_mapping=tensor(self.slot_mapping),
            query_lens_host=self.query_lens,
            seq_lens_host=self.seq_lens,
            num_decodes=self.num_decodes,
            attention=attention,
        )


class AttentionBackend(Protocol):
    """A paged KV pool and its attention."""

    num_blocks: int
    block_size: int

    def prepare(self, layout: BatchLayout) -> Batch:
        """Copy a step's batch to the device and prepare whatever all layers share."""

    def block_rows(self) -> list[Tensor]:
        """Return all of the pool as tensors whose first index is a block."""

    def release(self) -> None:
        """Free the pool."""
