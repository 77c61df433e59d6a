"""The choice of one token per row of logits: the most likely one, or a sampled one. In PyTorch.

Sampling is by inversion of the cumulative distribution at a uniform number, which is a function of the
sequence's seed and the token's index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ullm.model.memory.upload import select_rows, upload_list

NUCLEUS_CANDIDATES = (256, 4096)
"""Numbers of most likely tokens to try for top_p on a CPU, in turn, since sorting all of them is slow."""
SPAN = 128
"""Neighbouring tokens whose probabilities are summed first."""
COLDEST = 1e-30
"""Least temperature; a lower one would be 0 in float32."""
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


SamplingFilter = tuple[float, int, float, float]
"""Temperature (0: the most likely token), top_k (0: all tokens), top_p and min_p of one row."""

ChooseTokens = Callable[[Tensor, Sequence[SamplingFilter], Sequence[float]], Tensor]
"""The signature of `choose_tokens`."""


def choose_tokens(logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
    """Return one token per row.

    Args:
        logits: ``[rows, vocab]`` in any float type; not changed.
        filters: one per row.
        uniforms: one number in [0, 1) per row; ignored at temperature 0.

    Returns:
        ``[rows]`` int64 on the logits' device; on CUDA the host does not wait for it.
    """
    random = [row for row, (temperature, *_) in enumerate(filters) if temperature]
    if random and len(random) == len(filters):
        return sample_tokens(logits, filters, uniforms)
    tokens = first_of_largest(logits)
    if random:
        chosen = [filters[row] for row in random], [uniforms[row] for row in random]
        where = upload_list(logits.device, random)
        tokens.index_copy_(0, where, sample_tokens(logits.index_select(0, where), *chosen))
    return tokens


def first_of_largest(logits: Tensor) -> Tensor:
    """Return the first of each row's largest values: ``[rows, vocab]`` → ``[rows]``."""
    return logits.max(dim=-1).indices  # argmax is slow in bfloat16 on CPUs


def uniform(seed: int, index: int) -> float:
    """Return the number in [0, 1) that samples one token; the same on every machine.

    The seed is mixed once before, so that neighbouring seeds are unrelated.
    """
    return (splitmix64(splitmix64(seed, 0), index) >> 11) * 2.0**-53


def splitmix64(seed: int, index: int) -> int:
    """Return the ``index``-th output of SplitMix64, 64 bits.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    value = (seed + (index + 1) * _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample_tokens(logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
    """Sample one token per row from its filtered distribution.

    Arguments and result are those of `choose_tokens`, with temperatures above 0.
    """
    columns = (*zip(*filters, strict=True), uniforms)
    temperature, *limits, uniform = upload_list(logits.device, columns, np.float64).unsqueeze(2)
    scaled = logits - logits.amax(dim=-1, keepdim=True).float()  # no overflow, however cold
    weights = torch.softmax(scaled.div_(temperature.float().clamp(min=COLDEST)), dim=-1)
    if any(top_k or top_p < 1 or min_p for _, top_k, top_p, min_p in filters):
        weights.masked_fill_(weights < _floor(weights, filters, *limits), 0)
    return _invert(weights, uniform)


def _floor(
    weights: Tensor,
    filters: Sequence[SamplingFilter],
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """Return the smallest probability that each row's filters keep, ``[rows, 1]``."""
    floor = (min_p * weights.amax(dim=-1, keepdim=True)).float()
    limited = [row for row, (_, k, _, _) in enumerate(filters) if k]
    if limited:
        most = max(k for _, k, _, _ in filters)
        chosen = (select_rows(column, limited) for column in (weights, top_p, top_k.long()))
        floor = _raised(floor, limited, _lowest_kept(next(chosen), most, *chosen)[0])
    nucleus = [row for row, (_, k, p, _) in enumerate(filters) if not k and p < 1]
    if nucleus:
        lowest = _nucleus_floor(select_rows(weights, nucleus), select_rows(top_p, nucleus))
        floor = _raised(floor, nucleus, lowest)
    return floor


def _raised(floor: Tensor, rows: list[int], least: Tensor) -> Tensor:
    """Return ``floor``, raised to at least ``least`` in these rows."""
    if len(rows) == len(floor):
        return torch.maximum(floor, least)
    where = upload_list(floor.device, rows)
    return floor.index_copy(0, where, torch.maximum(floor.index_select(0, where), least))


def _nucleus_floor(weights: Tensor, top_p: Tensor) -> Tensor:
    """Return the smallest probability that top_p keeps.

    A CPU sorts only the most likely tokens if they suffice; a GPU sorts all, to avoid waiting for the answer.
    """
    vocab_size = weights.shape[1]
    few = NUCLEUS_CANDIDATES if weights.device.type == "cpu" else ()
    first, *further = [*(size for size in few if size < vocab_size), vocab_size]
    floor, reached = _lowest_kept(weights, first, top_p)
    for size in further:
        short = (~reached).nonzero()[:, 0]
        if not len(short):
            break
        floor[short], reached[short] = _lowest_kept(weights[short], size, top_p[short])
    return floor


def _lowest_kept(
    weights: Tensor, most: int, top_p: Tensor, top_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the smallest probability that top_k and then top_p keep.

    Args:
        weights: ``[rows, vocab]`` float32 probabilities.
        most: number of the most likely tokens to look at.
        top_p: ``[rows, 1]`` float64.
        top_k: ``[rows, 1]`` int64, at most ``most``; None: no limit.

    Returns:
        ``[rows, 1]`` the probabilities, and ``[rows]`` True where ``most`` tokens were enough.
    """
    top = weights.topk(most, dim=-1).values
    cumulated = top.cumsum(-1, dtype=torch.float64)
    last = torch.full_like(top_p, most - 1, dtype=torch.int64) if top_k is None else top_k - 1
    needed = top_p if top_k is None else top_p * cumulated.gather(1, last)
    reached_at = torch.searchsorted(cumulated, needed)
    return top.gather(1, torch.minimum(reached_at, last)), reached_at[:, 0] < most


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the token at which the cumulative distribution, in order of token ids, exceeds ``uniform``.

    The span of tokens is looked up first, by the sums of all spans, then the token within it. That avoids
    writing (and on a CPU paging in) a float64 copy of all weights.

    Args:
        weights: ``[rows, vocab]`` float32, not normalised; a token of weight 0 is never sampled.
        uniform: ``[rows, 1]`` float64 in [0, 1).
    """
    missing = -weights.shape[1] % SPAN
    spans = (F.pad(weights, (0, missing)) if missing else weights).view(len(weights), -1, SPAN)
    ends = spans.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform * ends[:, -1:]
    span = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    within = spans.gather(1, span[:, :, None].expand(-1, -1, SPAN))[:, 0].cumsum(-1, dtype=torch.float64)
    start = F.pad(ends, (1, 0)).gather(1, span)
    last = torch.nextafter(within[:, -1:], torch.zeros_like(start))  # rounding must not lead beyond the span
    offset = torch.searchsorted(within, torch.minimum(target - start, last), right=True)
    return (span * SPAN + offset)[:, 0].clamp_(max=weights.shape[1] - 1)
