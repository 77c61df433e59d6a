"""The choice of the attention kernel for decodes, measured on the GPU when the KV pool is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ullm.errors import one_line
from ullm.logs import get_logger
from ullm.model.attention.varlen import DecodeAttention, SequenceGroup, VarlenAttention, VarlenStep

log = get_logger(__name__)

LENGTH = 1024
"""Longest sequences that are measured, in tokens; half of them are half as long."""
CALLS, REPEATS = 8, 5
"""Calls per measurement, and number of measurements, of which the fastest counts."""
WORTH = 0.95
"""A kernel replaces another one if it needs at most this fraction of its time."""
TOLERANCE = 0.005
"""Largest difference between kernels' results, which are means of many random numbers: a few roundings."""

Seconds = Callable[[Callable[[], Tensor]], float]
"""Measures the seconds that one call takes."""


class SplitDecode:
    """`ullm.model.kernels.cuda.decode` in the form of a `ullm.model.attention.varlen.DecodeAttention`.

    Args:
        kernels: that module.
        tiling: one of its ``TILINGS``.
        processors: number of the GPU's multiprocessors.
    """

    def __init__(self, kernels: Any, tiling: Any, processors: int) -> None:
        self._kernels, self.tiling, self._processors = kernels, tiling, processors

    def __call__(
        self, q: Tensor, pool: Tensor, group: SequenceGroup, scale: float, sliding_window: int | None
    ) -> Tensor:
        """See `Decode`."""
        kv_heads = pool.shape[3]
        splits = self._kernels.choose_splits(
            len(q), kv_heads, self._processors, group.max_seq_len, self.tiling.keys
        )
        out: Tensor = self._kernels.decode_attention(
            q,
            pool,
            group.seq_lens,
            group.block_tables,
            scale=scale,
            window=sliding_window or 0,
            splits=splits,
            tiling=self.tiling,
        )
        return out


@dataclass(frozen=True)
class DecodeChoice:
    """A kernel for few sequences, which are split, and one for many.

    Args:
        few, many: the kernels; None: Flash Attention.
        limit: least number of sequences that counts as many.
    """

    few: DecodeAttention | None
    many: DecodeAttention | None
    limit: int

    def __call__(self, count: int) -> DecodeAttention | None:
        """Return the kernel for ``count`` sequences."""
        return self.many if count >= self.limit else self.few


@torch.inference_mode()
def choose_decode(
    backend: VarlenAttention,
    max_bs: int,
    processors: int,
    progress: Callable[[], None],
    seconds: Seconds | None = None,
) -> DecodeChoice | None:
    """Return the fastest kernels that agree with Flash Attention on this GPU; None: always Flash Attention.

    Args:
        backend: the KV pool, whose content is overwritten.
        max_bs: most sequences of a batch.
        processors: number of the GPU's multiprocessors.
        progress: called after each kernel.
        seconds: measures one call; None: on the GPU.
    """
    limit = max(1, 2 * processors // backend.shape.num_kv_heads)
    try:
        kernels = import_module("ullm.model.kernels.cuda.decode")
        candidates: list[DecodeAttention] = [
            SplitDecode(kernels, tiling, processors) for tiling in kernels.TILINGS
        ]
        few, many = (
            fastest(backend, candidates, count, seconds or seconds_on_gpu, progress)
            for count in (min(max_bs, max(1, limit // 8)), max_bs)
        )
    except Exception as error:  # no Triton, no C compiler, or whatever its compiler raises
        log.warning("using Flash Attention for decode", reason=one_line(error))
        return None
    return None if few is None and many is None else DecodeChoice(few, many, limit)


def fastest(
    backend: VarlenAttention,
    candidates: list[DecodeAttention],
    count: int,
    seconds: Seconds,
    progress: Callable[[], None],
) -> DecodeAttention | None:
    """Return the fastest candidate that agrees with Flash Attention; None if Flash Attention is the fastest.

    Args:
        count: number of sequences.
        seconds: measures one call.
        progress: called before each candidate.
    """
    group = random_group(backend, count)
    shape = backend.shape
    pool, scale = backend.pools[0], shape.head_dim**-0.5
    q = torch.randn(count, shape.num_query_heads, shape.head_dim, device=backend.device).to(pool.dtype)
    step = VarlenStep(backend, group.query_start, [group])
    expected = step.attend(0, q, scale, None)
    best, least = None, seconds(lambda: step.attend(0, q, scale, None))
    timings = {"Flash Attention": least}
    for attend in candidates:
        progress()
        difference = (attend(q, pool, group, scale, None).float() - expected.float()).abs().max().item()
        if not difference <= TOLERANCE:
            log.warning("a kernel disagrees with Flash Attention and is not used", by=difference)
            continue
        duration = seconds(lambda: attend(q, pool, group, scale, None))  # noqa: B023  # called at once
        timings[str(getattr(attend, "tiling", attend))] = duration
        if duration <= WORTH * least:
            best, least = attend, duration
    log.info(
        "attention for decodes", sequences=count, microseconds={k: round(v * 1e6) for k, v in timings.items()}
    )
    return best


def random_group(backend: VarlenAttention, count: int) -> SequenceGroup:
    """Overwrite a layer's pool with random numbers; return sequences that are spread over it."""
    size, device = backend.block_size, backend.device
    width = max(1, min(LENGTH // size, backend.num_blocks))
    blocks = min(backend.num_blocks, count * width)
    pool = backend.pools[0]
    pool[:, :blocks].normal_()
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
    tables = order[torch.arange(count * width) % blocks].view(count, width).to(torch.int32)
    lens = torch.full((count,), width * size, dtype=torch.int32)
    lens[count // 2 :] = max(1, width * size // 2)
    starts = torch.arange(count + 1, dtype=torch.int32)
    return SequenceGroup(starts.to(device), lens.to(device), tables.to(device), count, 1, width * size)


def seconds_on_gpu(work: Callable[[], Tensor]) -> float:
    """Return the seconds of one call without the cost of launching it: inside a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            work()
    try:
        return min(_elapsed(graph) for _ in range(REPEATS)) / CALLS
    finally:
        graph.reset()


def _elapsed(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
