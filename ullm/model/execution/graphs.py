"""CUDA graphs of decode steps: one per batch size and reach, replayed instead of launching each kernel."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ullm.config import EngineConfig
from ullm.model.attention.batch import Batch, BatchLayout, CausalModel
from ullm.model.attention.varlen import SequenceGroup, VarlenAttention, VarlenStep
from ullm.model.execution.last_tokens import LastTokens
from ullm.model.execution.sequences import DeviceOnlyTokens, Int32s
from ullm.model.kernels.cuda.decode_choice import choose_decode

FIRST_REACH, REACH_GROWTH = 1024, 4
"""Longest sequence of a small batch's first graph, in tokens, and the factor from one graph to the next.
Attention splits sequences by the longest possible one, so a graph for 40,960 tokens would read a single
sequence of 500 with only a few of the GPU's 132 processors."""
SPLITTING_BLOCKS = 2
"""Thread blocks per processor at which the kernel stops splitting sequences. The exact limit is lower;
see ``num_splits_heuristic`` in PyTorch's flash_api.cpp."""
HEADER = 5
"""Numbers per sequence before the block tables: token, position, length, KV slot, source of the token."""


def graph_sizes(max_bs: int) -> list[int]:
    """Return the batch sizes to capture: 1, 2, 4, then multiples of 8, and ``max_bs`` itself."""
    return sorted({size for size in (1, 2, 4, *range(8, max_bs + 1, 8), max_bs) if size <= max_bs})


def graph_reaches(size: int, max_seq_len: int, kv_heads: int, processors: int) -> list[int]:
    """Return the lengths of the longest sequence to capture for a batch size; the last is ``max_seq_len``."""
    reaches = []
    reach = FIRST_REACH
    while size * kv_heads < SPLITTING_BLOCKS * processors and reach < max_seq_len:
        reaches.append(reach)
        reach *= REACH_GROWTH
    return [*reaches, max_seq_len]


class ReplayableGraph(Protocol):
    """The part of `torch.cuda.CUDAGraph` that is used here."""

    def replay(self) -> None:
        """Run the captured kernels again."""

    def reset(self) -> None:
        """Free the graph."""


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph and its output, ``hidden [size, hidden_size]``."""

    graph: ReplayableGraph
    hidden: Tensor


class DecodeGraphs:
    """Captured decode steps, up to the final norm.

    All graphs share one memory pool and one input tensor, which a single copy fills. A batch smaller than
    its graph is padded with sequences of length 1 that live in the KV pool's padding block.

    Args:
        model: computes the steps.
        backend: the KV pool and its attention.
        last_tokens: where the steps read the tokens that were sampled before.
        max_bs: largest batch.
        max_seq_len: longest sequence that will ever be decoded, in tokens.
        processors: number of the GPU's multiprocessors.
    """

    def __init__(
        self,
        model: CausalModel,
        backend: VarlenAttention,
        last_tokens: LastTokens,
        max_bs: int,
        max_seq_len: int,
        processors: int,
    ) -> None:
        self.model, self.backend, self.max_seq_len = model, backend, max_seq_len
        self.sizes = graph_sizes(max_bs)
        kv_heads = backend.shape.num_kv_heads
        self.reaches = {size: graph_reaches(size, max_seq_len, kv_heads, processors) for size in self.sizes}
        self.last_tokens = last_tokens.tensor
        self.inputs = torch.zeros(
            max_bs * (HEADER + self._width(max_seq_len)), dtype=torch.int32, device=backend.device
        )
        self.starts = torch.arange(max_bs + 1, dtype=torch.int32, device=backend.device)
        self.graphs: dict[tuple[int, int], CapturedStep] = {}

    def capture(self, progress: Callable[[], None]) -> None:
        """Run and capture a step of each kind, the largest first, so that the others reuse its memory."""
        pool = None
        for size in reversed(self.sizes):
            for reach in reversed(self.reaches[size]):
                self._write(size, reach, None, ([], []))
                self._step(size, reach)  # so that nothing is compiled or loaded during capture
                torch.cuda.synchronize(self.backend.device)
                graph = torch.cuda.CUDAGraph()
                with capturing(graph, pool):
                    hidden = self._step(size, reach)
                pool = pool or graph.pool()
                self.graphs[size, reach] = CapturedStep(graph, hidden)
                progress()

    def covers(self, layout: BatchLayout, last_tokens: LastTokens) -> bool:
        """Return True if `run` can compute this step: only decodes, and not too many."""
        rows = len(layout.seq_lens)
        return layout.num_decodes == rows <= self.sizes[-1] and last_tokens.tensor is self.last_tokens

    def run(self, layout: BatchLayout, device_only_tokens: DeviceOnlyTokens) -> Tensor:
        """Return the step's hidden states, ``[N, hidden_size]``; the next run overwrites them.

        Args:
            layout: the step's batch.
            device_only_tokens: tokens of the batch that only the device knows.
        """
        rows = len(layout.seq_lens)
        size = self.sizes[bisect_left(self.sizes, rows)]
        reaches = self.reaches[size]
        reach = reaches[bisect_left(reaches, max(layout.seq_lens))]
        self._write(size, reach, layout, device_only_tokens)
        captured = self.graphs[size, reach]
        captured.graph.replay()
        return captured.hidden[:rows]

    def release(self) -> None:
        """Free the graphs and their memory."""
        for captured in self.graphs.values():
            captured.graph.reset()
        self.graphs.clear()

    def _width(self, reach: int) -> int:
        return -(-reach // self.backend.block_size)

    def _write(
        self, size: int, reach: int, layout: BatchLayout | None, device_only_tokens: DeviceOnlyTokens
    ) -> None:
        """Copy a step's input to the device. PyTorch keeps the pinned memory until the copy is complete.

        Args:
            layout: the step's batch; None: only padding.
        """
        width = self._width(reach)
        host = torch.empty(
            size * (HEADER + width), dtype=torch.int32, pin_memory=self.backend.device.type == "cuda"
        )
        numbers = host.numpy()
        header = numbers[: HEADER * size].reshape(HEADER, size)
        tables = numbers[HEADER * size :].reshape(size, width)
        pad(header, tables, self.backend.padding_block, self.backend.block_size)
        if layout is not None:
            fill(header, tables, layout, device_only_tokens, len(self.last_tokens))
        self.inputs[: len(numbers)].copy_(host, non_blocking=True)

    def _step(self, size: int, reach: int) -> Tensor:
        """Compute a decode step from the input tensor."""
        batch = self._batch(size, reach)
        return self.model.forward(batch.token_ids, batch)

    def _batch(self, size: int, reach: int) -> Batch:
        """Return a batch of views of the input tensor, and of tensors computed from it."""
        header = self.inputs[: HEADER * size].view(HEADER, size)
        width = self._width(reach)
        tables = self.inputs[HEADER * size : (HEADER + width) * size].view(size, width)
        token_ids, positions, _, slot_mapping, source = header.long()
        known = torch.cat((self.last_tokens, token_ids))
        starts = self.starts[: size + 1]
        group = SequenceGroup(starts, header[2], tables, size, 1, reach)
        return Batch(
            token_ids=known.index_select(0, source),
            positions=positions,
            query_start=starts,
            seq_lens=header[2],
            block_tables=tables,
            slot_mapping=slot_mapping,
            query_lens_host=[1] * size,
            seq_lens_host=[1] * size,
            num_decodes=size,
            attention=VarlenStep(self.backend, slot_mapping, [group]),
        )


@torch.inference_mode()
def make_graphs(
    config: EngineConfig,
    model: CausalModel,
    backend: VarlenAttention,
    last_tokens: LastTokens,
    max_seq_len: int,
    progress: Callable[[], None],
) -> DecodeGraphs | None:
    """Choose the attention kernel for decodes and capture their graphs; None with ``enforce_eager``."""
    processors = torch.cuda.get_device_properties(backend.device).multi_processor_count
    if config.gpu_kernels:
        backend.choose_decode = choose_decode(backend, config.max_bs, processors, progress)
    if config.enforce_eager:
        return None
    graphs = DecodeGraphs(model, backend, last_tokens, config.max_bs, max_seq_len, processors)
    graphs.capture(progress)
    return graphs


def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> AbstractContextManager[None]:
    """Capture the kernels launched in this context; other threads may use the GPU meanwhile."""
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


def pad(header: Int32s, tables: Int32s, padding_block: int, block_size: int) -> None:
    """Fill the input with sequences of one token in the padding block; which token does not matter."""
    header[:] = np.array([[0], [0], [1], [padding_block * block_size], [0]])
    tables[:] = padding_block


def fill(
    header: Int32s, tables: Int32s, layout: BatchLayout, device_only_tokens: DeviceOnlyTokens, slots: int
) -> None:
    """Write a step's sequences over the padding, from the first row on.

    Args:
        slots: number of slots of `LastTokens`; the step's own tokens follow them.
    """
    rows, width = layout.block_tables.shape
    header[:4, :rows] = (layout.token_ids, layout.positions, layout.seq_lens, layout.slot_mapping)
    header[4, :rows] = slots + np.arange(rows)
    indices, sources = device_only_tokens
    header[4, indices] = sources
    tables[:rows, :width] = layout.block_tables
