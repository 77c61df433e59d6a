"""One step's input to a model: flattened tokens without padding, and where their KV lives.

What a model is to the runner, and what a batch is to a model:

* ``hidden = model.forward(batch.token_ids, batch)`` — ``[T]`` → ``[T, hidden_size]``;
* ``logits = model.logits(hidden[rows])`` — ``[rows, hidden_size]`` → ``[rows, vocab_size]``;
* in each layer the model calls ``batch.attention(layer, q, k, v, scale)``, which stores k and v in
  the paged pool and then lets every query attend to its own sequence's keys, causally.

Token t of the batch belongs to the sequence i with ``query_start[i] <= t < query_start[i + 1]``. The
first ``num_decodes`` sequences have exactly one query token each.
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


class Attend(Protocol):
    """Attention over the paged KV of one step."""

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
        """Store ``k`` and ``v``, then attend.

        Args:
            layer: index of the layer, from 0.
            q: ``[T, query heads of this rank, head_dim]``, already rotated.
            k: ``[T, KV heads of this rank, head_dim]``, already rotated.
            v: as ``k``.
            scale: factor of the scores, usually ``head_dim ** -0.5``.
            sliding_window: keys that a query sees, itself included; None: all before it.
            softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).

        Returns:
            ``[T, query heads, head_dim]``, contiguous.
        """


def no_progress() -> None:
    """What is called after each layer where nobody waits for a sign of life."""


@dataclass(slots=True)
class Batch:
    """One step's tokens and the sequences that they belong to. T tokens, N sequences.

    Args:
        token_ids: ``[T]`` int64.
        positions: ``[T]`` int64, each token's position in its sequence, from 0.
        query_start: ``[N + 1]`` int32, first token of each sequence, and T.
        seq_lens: ``[N]`` int32, KV length after this step, the cached tokens included.
        block_tables: ``[N, W]`` int32, block ids of each sequence, padded with 0.
        slot_mapping: ``[T]`` int64, where each token's KV goes: ``block_id * block_size + offset``.
        query_lens_host: query tokens of each sequence, as Python numbers.
        seq_lens_host: ``seq_lens`` as Python numbers.
        num_decodes: leading sequences with one query token.
        attention: attention over this batch's sequences.
        layer_done: called after each layer, or a few quick ones; a sign of life.
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


class CausalModel(Protocol):
    """What the runner needs of a model; native ones are modules, others wrap transformers'."""

    @property
    def kv_shape(self) -> KvShape:
        """What the KV pool must hold."""

    @property
    def dtype(self) -> torch.dtype:
        """Numbers of weights, activations and KV."""

    def forward(self, token_ids: Tensor, batch: Batch) -> Tensor:
        """``[T]`` token ids → ``[T, hidden_size]`` after the final norm."""

    def logits(self, hidden: Tensor) -> Tensor:
        """``[rows, hidden_size]`` → ``[rows, vocab_size]`` of the whole vocabulary, on every rank."""

    def choose(self, logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
        """One token per row of what `logits` returned; see `ullm.model.sampling.choose.choose_tokens`."""

    def tensors(self) -> Iterable[Tensor]:
        """All that lies on the device for good, weights above all; what shares memory may come twice."""

    def num_parameters(self) -> int:
        """Elements of the weights of the whole model, tied ones once."""

    def weight_bytes(self) -> int:
        """Bytes of weights that this rank holds."""


@dataclass
class BatchLayout:
    """A batch as the runner plans it on the host: the same arrays as `Batch`, in numpy."""

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    query_lens: list[int]
    seq_lens: list[int]
    block_tables: npt.NDArray[np.int32]
    slot_mapping: npt.NDArray[np.int64]
    num_decodes: int

    @cached_property
    def starts(self) -> npt.NDArray[np.int32]:
        """First token of each sequence, and the number of tokens."""
        if self.num_decodes == len(self.query_lens):
            return np.arange(len(self.query_lens) + 1, dtype=np.int32)
        return np.concatenate(([0], np.cumsum(self.query_lens))).astype(np.int32)

    def batch(self, attention: Attend, device: torch.device | str = "cpu") -> Batch:
        """The same on a device, with the attention that goes with it."""

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
    """Owns the paged KV pool and attends over it."""

    num_blocks: int
    block_size: int

    def prepare(self, layout: BatchLayout) -> Batch:
        """Bring a step's layout to the device, and whatever all layers share."""

    def release(self) -> None:
        """Free the pool."""
