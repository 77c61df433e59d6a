"""CUDA graphs of decode steps: one per batch size, replayed instead of launching every kernel."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ullm.model.attention_varlen import VarlenAttention, VarlenStep
from ullm.model.batch import Batch, CausalModel


def graph_sizes(max_bs: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, then multiples of 8, and ``max_bs`` itself."""
    return sorted({size for size in (1, 2, 4, *range(8, max_bs + 1, 8), max_bs) if size <= max_bs})


class DecodeGraphs:
    """Captured decode steps, up to the final norm.

    All graphs share one set of input tensors and one memory pool. A batch that is smaller than its
    graph is padded with sequences of length 1 that live in the pool's padding block.

    Args:
        max_seq_len: longest sequence that will ever be decoded.
    """

    def __init__(self, model: CausalModel, backend: VarlenAttention, max_bs: int, max_seq_len: int) -> None:
        self.model, self.backend = model, backend
        self.sizes = graph_sizes(max_bs)
        self.width = -(-max_seq_len // backend.block_size)
        self.max_seq_len = max_seq_len
        self.inputs = padding_batch(backend, max_bs, self.width)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def capture(self, progress: Callable[[], None]) -> None:
        """Run and record a step of each size, the largest first, so that the others reuse its memory."""
        pool = None
        for size in reversed(self.sizes):
            batch = self._slice(size)
            self.model.forward(batch.token_ids, batch)
            torch.cuda.synchronize(self.backend.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                hidden = self.model.forward(batch.token_ids, batch)
            pool = pool or graph.pool()
            self.graphs[size] = graph, hidden
            progress()

    def covers(self, batch: Batch) -> bool:
        """Whether `run` can compute this batch."""
        rows = len(batch.seq_lens_host)
        return batch.num_decodes == rows <= self.sizes[-1]

    def run(self, batch: Batch) -> Tensor:
        """The batch's hidden states ``[N, hidden_size]``; overwritten by the next run."""
        rows = batch.num_decodes
        size = self.sizes[bisect_left(self.sizes, rows)]
        fill(self.inputs, batch, rows, size, self.backend)
        graph, hidden = self.graphs[size]
        graph.replay()
        return hidden[:rows]

    def release(self) -> None:
        """Free the graphs and their memory."""
        for graph, _ in self.graphs.values():
            graph.reset()
        self.graphs.clear()

    def _slice(self, size: int) -> Batch:
        whole = self.inputs
        batch = Batch(
            token_ids=whole.token_ids[:size],
            positions=whole.positions[:size],
            query_start=whole.query_start[: size + 1],
            seq_lens=whole.seq_lens[:size],
            block_tables=whole.block_tables[:size],
            slot_mapping=whole.slot_mapping[:size],
            query_lens_host=[1] * size,
            seq_lens_host=[1] * size,
            num_decodes=size,
            attention=whole.attention,
        )
        batch.attention = VarlenStep(self.backend, batch, 1, self.max_seq_len)
        return batch


def padding_batch(backend: VarlenAttention, rows: int, width: int) -> Batch:
    """``rows`` sequences of one token in the padding block."""
    on_device = backend.to_device
    table = np.full((rows, width), backend.padding_block, dtype=np.int32)
    slots = np.full(rows, backend.padding_block * backend.block_size, dtype=np.int64)
    batch = Batch(
        token_ids=on_device(np.zeros(rows, dtype=np.int64)),
        positions=on_device(np.zeros(rows, dtype=np.int64)),
        query_start=on_device(np.arange(rows + 1, dtype=np.int32)),
        seq_lens=on_device(np.ones(rows, dtype=np.int32)),
        block_tables=on_device(table),
        slot_mapping=on_device(slots),
        query_lens_host=[1] * rows,
        seq_lens_host=[1] * rows,
        num_decodes=rows,
        attention=backend.unprepared,
    )
    batch.attention = VarlenStep(backend, batch, 1, width * backend.block_size)
    return batch


def fill(inputs: Batch, batch: Batch, rows: int, size: int, backend: VarlenAttention) -> None:
    """Copy a batch of ``rows`` sequences into the graph's inputs, and pad up to ``size``."""
    for name in ("token_ids", "positions", "seq_lens", "slot_mapping"):
        getattr(inputs, name)[:rows].copy_(getattr(batch, name))
    inputs.block_tables[:rows, : batch.block_tables.shape[1]].copy_(batch.block_tables)
    if size > rows:
        inputs.positions[rows:size].zero_()
        inputs.seq_lens[rows:size].fill_(1)
        inputs.block_tables[rows:size, 0].fill_(backend.padding_block)
        inputs.slot_mapping[rows:size].fill_(backend.padding_block * backend.block_size)
