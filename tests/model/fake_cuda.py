"""CUDA's code paths on a CPU: the paged kernel in plain PyTorch, and graphs that compute their step again.

The kernel checks its arguments for what Flash Attention's kernel requires, and ignores keys beyond the
longest length that it is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.model.model_fixtures import load_runner
from ullm.model.attention.varlen import CAUSAL, FULL, SequenceGroup, VarlenAttention
from ullm.model.execution.graphs import CapturedStep, DecodeGraphs
from ullm.model.execution.runner import ModelRunner


class Calls:
    """A kernel that records its calls.

    Attributes:
        calls: per call, (sequences, longest query, longest sequence, window).
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int, tuple[int, int]]] = []

    def __call__(
        self,
        q: Tensor,
        pool: Tensor,
        group: SequenceGroup,
        key_start: Tensor,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        query_start, seq_lens, block_tables = group.query_start, group.seq_lens, group.block_tables
        count, window = len(seq_lens), group.window(sliding_window)
        max_query_len, max_seq_len = group.max_query_len, group.max_seq_len
        self.calls.append((count, max_query_len, max_seq_len, window))
        for numbers in (query_start, key_start, seq_lens, block_tables):
            assert numbers.dtype == torch.int32
        assert query_start.shape == key_start.shape == (count + 1,)
        assert query_start.is_contiguous()
        assert seq_lens.is_contiguous()
        assert key_start.tolist() == [0, *torch.cumsum(seq_lens, 0).tolist()]
        assert query_start[-1] == len(q)
        assert block_tables.shape[0] == count
        assert block_tables.stride(1) == q.stride(-1) == 1
        assert int(seq_lens.max()) <= max_seq_len <= block_tables.shape[1] * pool.shape[2]
        out = torch.empty(q.shape, dtype=q.dtype)
        for i, (start, end) in enumerate(zip(query_start.tolist(), query_start.tolist()[1:], strict=False)):
            assert end - start <= max_query_len
            length = min(int(seq_lens[i]), max_seq_len)
            k, v = (half[block_tables[i].long()].flatten(0, 1)[:length] for half in pool)
            out[start:end] = attend(q[start:end], k, v, scale, window)
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: tuple[int, int]) -> Tensor:
    """Compute attention of one sequence; the last query is at the last key."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    distance = torch.arange(len(k)) - torch.arange(len(k) - len(q), len(k))[:, None]
    left, right = window
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen &= distance <= right if right >= 0 else seen
    seen &= distance >= -left if left >= 0 else seen
    assert window in (FULL, CAUSAL) or (left >= 0 and right == 0)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


class Anew:
    """Stands in for a CUDA graph: computes the same step from the current inputs."""

    def __init__(self, graphs: DecodeGraphs, size: int, reach: int) -> None:
        self.graphs, self.size, self.reach = graphs, size, reach
        self.hidden = torch.empty(0)
        self.replays = 0

    def replay(self) -> None:
        """Compute the step into the tensor that a replay would write to."""
        self.replays += 1
        self.hidden.copy_(self.graphs._step(self.size, self.reach))

    def reset(self) -> None:
        """Do nothing; there is nothing to free."""


def fake_graphs(graphs: DecodeGraphs) -> dict[tuple[int, int], Anew]:
    """Fill in graphs as `DecodeGraphs.capture` does."""
    found = {}
    for size in graphs.sizes:
        for reach in graphs.reaches[size]:
            graphs._write(size, reach, None, ([], []))
            fake = Anew(graphs, size, reach)
            fake.hidden = graphs._step(size, reach).clone()
            graphs.graphs[size, reach] = CapturedStep(fake, fake.hidden)
            found[size, reach] = fake
    return found


class FakeCuda:
    """A runner whose rank computes as on CUDA, with a model in float32 on the CPU.

    Args:
        graphs: "capture" decodes.
        processors: number of the imaginary GPU's multiprocessors.
    """

    def __init__(self, path: Path, *, graphs: bool, processors: int = 132, **options: Any) -> None:
        self.runner: ModelRunner = load_runner(path, cpu_kernels=False, **options)
        rank = self.runner._rank
        assert rank is not None
        old, model = rank.backend, rank.model
        cpu = torch.device("cpu")
        backend = VarlenAttention(model.kv_shape, old.num_blocks, old.block_size, model.dtype, cpu)
        self.kernel = backend.kernel = Calls()
        rank.backend = backend
        self.rank, self._processors = rank, processors
        self.graphs: dict[tuple[int, int], Anew] = {}
        if graphs:
            self.capture()

    @torch.inference_mode()
    def capture(self) -> None:
        """Make graphs of the model's steps."""
        rank, backend = self.rank, self.rank.backend
        assert isinstance(backend, VarlenAttention)
        rank.graphs = DecodeGraphs(
            rank.model,
            backend,
            rank.last_tokens,
            rank.context.config.max_bs,
            rank.info.context_len,
            self._processors,
        )
        self.graphs = fake_graphs(rank.graphs)
        self.kernel.calls.clear()

    @property
    def replays(self) -> dict[tuple[int, int], int]:
        """(size, reach) → number of replays of that graph."""
        return {key: graph.replays for key, graph in self.graphs.items() if graph.replays}
