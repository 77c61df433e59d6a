"""CUDA graphs of decode steps: one per batch size and reach, replayed instead of launching every kernel."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ullm.config import EngineConfig
from ullm.model.attention.batch import Batch, CausalModel, Layout
from ullm.model.attention.varlen import Part, VarlenAttention, VarlenStep
from ullm.model.execution.last_tokens import LastTokens
from ullm.model.kernels.cuda.choice import choose_decode

Int32s = npt.NDArray[np.int32]
Fresh = tuple[list[int], list[int]]
"""Indices of tokens that are only on the device, and the slots that they are in."""

FIRST_REACH, REACH_GROWTH = 1024, 4
"""Tokens of the sequences for which the first graph of a small batch is made, and how much further each next
one's sequences reach. Attention splits sequences by the longest that there could be, so that in a graph for
40,960 tokens one sequence of 500 would be read by a few of the GPU's 132 processors."""
SPLITTING_BLOCKS = 2
"""Blocks of threads per processor from which on the kernel does not split sequences any more; a little less
in fact, see ``num_splits_heuristic`` in PyTorch's flash_api.cpp."""
HEADER = 5
"""Numbers per sequence before the block tables: token, position, length, KV slot, source of the token."""


def graph_sizes(max_bs: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, then multiples of 8, and ``max_bs`` itself."""
    return sorted({size for size in (1, 2, 4, *range(8, max_bs + 1, 8), max_bs) if size <= max_bs})


def graph_reaches(size: int, max_seq_len: int, kv_heads: int, processors: int) -> list[int]:
    """Lengths of the longest sequence to capture a batch size for; the last one is ``max_seq_len``."""
    found = []
    reach = FIRST_REACH
    while size * kv_heads < SPLITTING_BLOCKS * processors and reach < max_seq_len:
        found.append(reach)
        reach *= REACH_GROWTH
    return [*found, max_seq_len]


class Graph(Protocol):
    """As `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Compute again what was captured."""

    def reset(self) -> None:
        """Free it."""


@dataclass(frozen=True, slots=True)
class Captured:
    """One graph, and what it leaves: ``hidden [size, hidden_size]``."""

    graph: Graph
    hidden: Tensor


class DecodeGraphs:
    """Captured decode steps, up to the final norm.

    All graphs share one input tensor, which one copy fills, and one memory pool. A batch that is smaller
    than its graph is padded with sequences of length 1 that live in the pool's padding block.

    Args:
        last_tokens: where the steps find what was sampled before.
        max_seq_len: longest sequence that will ever be decoded.
        processors: of the GPU.
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
        self.graphs: dict[tuple[int, int], Captured] = {}

    def capture(self, progress: Callable[[], None]) -> None:
        """Run and record a step of each kind, the largest first, so that the others reuse its memory."""
        pool = None
        for size in reversed(self.sizes):
            for reach in reversed(self.reaches[size]):
                self._write(size, reach, None, ([], []))
                self._step(size, reach)  # so that nothing is compiled or loaded while it is recorded
                torch.cuda.synchronize(self.backend.device)
                graph = torch.cuda.CUDAGraph()
                with recording(graph, pool):
                    hidden = self._step(size, reach)
                pool = pool or graph.pool()
                self.graphs[size, reach] = Captured(graph, hidden)
                progress()

    def covers(self, layout: Layout, last_tokens: LastTokens) -> bool:
        """Whether `run` can compute this step: only decodes, and not too many."""
        rows = len(layout.seq_lens)
        return layout.num_decodes == rows <= self.sizes[-1] and last_tokens.tensor is self.last_tokens

    def run(self, layout: Layout, fresh: Fresh) -> Tensor:
        """The step's hidden states ``[N, hidden_size]``; overwritten by the next run.

        Args:
            fresh: of the step's tokens.
        """
        rows = len(layout.seq_lens)
        size = self.sizes[bisect_left(self.sizes, rows)]
        reaches = self.reaches[size]
        reach = reaches[bisect_left(reaches, max(layout.seq_lens))]
        self._write(size, reach, layout, fresh)
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

    def _write(self, size: int, reach: int, layout: Layout | None, fresh: Fresh) -> None:
        """Bring a step's numbers to the device; PyTorch keeps the pinned memory until that is done.

        Args:
            layout: None for padding alone.
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
            fill(header, tables, layout, fresh, len(self.last_tokens))
        self.inputs[: len(numbers)].copy_(host, non_blocking=True)

    def _step(self, size: int, reach: int) -> Tensor:
        """A decode step of what is in the inputs."""
        batch = self._batch(size, reach)
        return self.model.forward(batch.token_ids, batch)

    def _batch(self, size: int, reach: int) -> Batch:
        """Views of the inputs, and what is computed from them first."""
        header = self.inputs[: HEADER * size].view(HEADER, size)
        width = self._width(reach)
        tables = self.inputs[HEADER * size : (HEADER + width) * size].view(size, width)
        token_ids, positions, _, slot_mapping, source = header.long()
        known = torch.cat((self.last_tokens, token_ids))
        starts = self.starts[: size + 1]
        part = Part(starts, header[2], tables, size, 1, reach)
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
            attention=VarlenStep(self.backend, slot_mapping, [part]),
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
    """Choose what attends for decodes, and capture them; None where graphs are not wanted."""
    processors = torch.cuda.get_device_properties(backend.device).multi_processor_count
    if config.gpu_kernels:
        backend.choose_decode = choose_decode(backend, config.max_bs, processors, progress)
    if config.enforce_eager:
        return None
    graphs = DecodeGraphs(model, backend, last_tokens, config.max_bs, max_seq_len, processors)
    graphs.capture(progress)
    return graphs


def recording(graph: torch.cuda.CUDAGraph, pool: Any) -> AbstractContextManager[None]:
    """Capture what is launched; other threads, such as another engine's, may go on using the GPU."""
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


def pad(header: Int32s, tables: Int32s, padding_block: int, block_size: int) -> None:
    """Sequences of one token in the padding block; where the token comes from does not matter."""
    header[:] = np.array([[0], [0], [1], [padding_block * block_size], [0]])
    tables[:] = padding_block


def fill(header: Int32s, tables: Int32s, layout: Layout, fresh: Fresh, slots: int) -> None:
    """A step's sequences, in front of the padding.

    Args:
        slots: of last tokens; the step's own tokens are found behind them.
    """
    rows, width = layout.block_tables.shape
    header[:4, :rows] = (layout.token_ids, layout.positions, layout.seq_lens, layout.slot_mapping)
    header[4, :rows] = slots + np.arange(rows)
    indices, sources = fresh
    header[4, indices] = sources
    tables[:rows, :width] = layout.block_tables
