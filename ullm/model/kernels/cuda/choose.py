"""`ullm.model.sampling.choose.choose_tokens` in Triton. Importing this module requires Triton.

PyTorch launches some twenty kernels, each over all logits, and sorts them for top_p, which for 256 rows of
Qwen3's vocabulary takes longer than the model. Here the logits are read once, and one chunk of them again.
Filters find their thresholds by bisection of the logits' bits, with sixteen passes in bfloat16, without
sorting.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ullm.model.memory.upload import upload_list
from ullm.model.sampling.choose import COLDEST, SamplingFilter

CHUNK = 4096
BITS = {torch.bfloat16: 16}
"""Bits of a logit; 32 for other dtypes."""


@triton.jit
def _key(values):
    """Return integers in the order of the floats."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weights(values, most, temperature):
    """Return weights relative to the most likely token's; 0 for impossible tokens."""
    possible = values > float("-inf")
    scaled = tl.where(possible, values - most, 0.0) / temperature
    return tl.where(possible, tl.exp(scaled), 0.0)


@triton.jit
def _above(logits, least, most, temperature, VOCAB: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr):
    """Return how many tokens have a key of at least ``least``, and the sum of their weights."""
    count = 0
    weight = tl.full([], 0.0, tl.float64)
    for start in range(0, VOCAB, CHUNK):
        token = start + tl.arange(0, CHUNK)
        value = tl.load(logits + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        kept = ((_key(value) >> SHIFT) >= least) & (token < VOCAB)
        count += tl.sum(kept.to(tl.int32), 0)
        weight += tl.sum(tl.where(kept, _weights(value, most, temperature), 0.0).to(tl.float64), 0)
    return count, weight


@triton.jit(do_not_specialize=["rows"])  # not compiled for each number of rows
def _floors(
    logits, numbers, floors, stride, rows, COLDEST: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr,
    SHIFT: tl.constexpr,
) -> None:  # fmt: skip
    """Store the least logit that a row's filters keep; one program per row."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    temperature = tl.maximum(tl.load(numbers + row).to(tl.float32), COLDEST)
    top_k = tl.load(numbers + rows + row).to(tl.int32)
    top_p = tl.load(numbers + 2 * rows + row)
    min_p = tl.load(numbers + 3 * rows + row).to(tl.float32)
    floor = tl.full([], float("-inf"), tl.float32)
    if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
        most = tl.full([], float("-inf"), tl.float32)
        for start in range(0, VOCAB, CHUNK):
            token = start + tl.arange(0, CHUNK)
            value = tl.load(logits + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
            most = tl.maximum(most, tl.max(value, 0))
        if min_p > 0.0:
            floor = most + temperature * tl.log(min_p)
        low = tl.full([], -(1 << (31 - SHIFT)), tl.int64)
        needed = tl.full([], 0.0, tl.float64)
        if top_k > 0:
            high = tl.full([], (1 << (31 - SHIFT)) - 1, tl.int64)
            for _ in range(32 - SHIFT):
                middle = low + (high - low + 1) // 2
                count, _weight = _above(logits, middle, most, temperature, VOCAB, CHUNK, SHIFT)
                low = tl.where(count >= top_k, middle, low)
                high = tl.where(count >= top_k, high, middle - 1)
            above, weight = _above(logits, low + 1, most, temperature, VOCAB, CHUNK, SHIFT)
            _all, with_ties = _above(logits, low, most, temperature, VOCAB, CHUNK, SHIFT)
            needed = weight + (with_ties - weight) * (top_k - above) / (_all - above)
        else:
            _all, needed = _above(logits, low, most, temperature, VOCAB, CHUNK, SHIFT)
        if top_p < 1.0:
            needed = needed * top_p
            high = tl.full([], (1 << (31 - SHIFT)) - 1, tl.int64)
            for _ in range(32 - SHIFT):
                middle = low + (high - low + 1) // 2
                _count, weight = _above(logits, middle, most, temperature, VOCAB, CHUNK, SHIFT)
                low = tl.where(weight >= needed, middle, low)
                high = tl.where(weight >= needed, high, middle - 1)
        key = (low << SHIFT).to(tl.int32)
        least = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        floor = tl.where((top_k > 0) | (top_p < 1.0), tl.maximum(floor, least), floor)
    tl.store(floors + row, floor)


@triton.jit
def _summarise(
    logits, numbers, floors, mosts, indices, totals, stride, chunks, COLDEST: tl.constexpr,
    FILTER: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """Store each chunk's largest logit, the first token that has it, and the sum of all weights relative to
    it; one program per row and chunk."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    source = logits + row.to(tl.int64) * stride + token
    value = tl.load(source, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    if FILTER:
        value = tl.where(value >= tl.load(floors + row), value, float("-inf"))
    most = tl.max(value, 0)
    temperature = tl.maximum(tl.load(numbers + row).to(tl.float32), COLDEST)
    weight = tl.sum(_weights(value, most, temperature).to(tl.float64), 0)
    at = row * chunks + chunk
    tl.store(mosts + at, most)
    tl.store(indices + at, tl.min(tl.where(value == most, token, 0x7FFFFFFF), 0))
    tl.store(totals + at, weight)


@triton.jit(do_not_specialize=["rows"])
def _pick(
    logits, numbers, floors, mosts, indices, totals, out, stride, rows, chunks, COLDEST: tl.constexpr,
    FILTER: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
) -> None:  # fmt: skip
    """Store a row's token; one program per row."""
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < chunks
    at = row * chunks + chunk
    most_of_chunk = tl.load(mosts + at, mask=inside, other=float("-inf"))
    most = tl.max(most_of_chunk, 0)
    temperature = tl.load(numbers + row).to(tl.float32)
    if temperature == 0.0:
        first = tl.load(indices + at, mask=inside, other=0x7FFFFFFF)
        picked = tl.min(tl.where(most_of_chunk == most, first, 0x7FFFFFFF), 0)
    else:
        temperature = tl.maximum(temperature, COLDEST)
        weight = tl.load(totals + at, mask=inside, other=0.0)
        weight = weight * _weights(most_of_chunk, most, temperature).to(tl.float64)
        ends = tl.cumsum(weight, 0)
        target = tl.load(numbers + 4 * rows + row) * tl.sum(weight, 0)
        last = tl.max(tl.where(weight > 0.0, chunk, 0), 0)
        found = tl.minimum(tl.sum((ends <= target).to(tl.int32), 0), last)
        before = tl.sum(tl.where(chunk < found, weight, 0.0), 0)
        here = tl.max(tl.where(chunk == found, most_of_chunk, float("-inf")), 0)
        token = found * CHUNK + tl.arange(0, CHUNK)
        source = logits + row.to(tl.int64) * stride + token
        value = tl.load(source, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        if FILTER:
            value = tl.where(value >= tl.load(floors + row), value, float("-inf"))
        own = _weights(value, here, temperature).to(tl.float64)
        left = (target - before) / _weights(here, most, temperature).to(tl.float64)
        passed = tl.sum((tl.cumsum(own, 0) <= left).to(tl.int32), 0)
        last_token = tl.max(
            tl.where(own > 0.0, tl.arange(0, CHUNK), 0), 0
        )  # rounding must not lead beyond it
        picked = found * CHUNK + tl.minimum(passed, last_token)
    tl.store(out + row, picked.to(tl.int64))


def choose_tokens(logits: Tensor, filters: Sequence[SamplingFilter], uniforms: Sequence[float]) -> Tensor:
    """See `ullm.model.sampling.choose.choose_tokens`."""
    rows, vocab = logits.shape
    device, chunks, stride = logits.device, triton.cdiv(vocab, CHUNK), logits.stride(0)
    numbers = upload_list(device, (*zip(*filters, strict=True), uniforms), np.float64)
    floors = torch.empty(rows, dtype=torch.float32, device=device)
    filtered = any(top_k or top_p < 1 or min_p for _, top_k, top_p, min_p in filters)
    if filtered:
        shift = 32 - BITS.get(logits.dtype, 32)
        _floors[(rows,)](logits, numbers, floors, stride, rows, COLDEST, vocab, CHUNK, shift, num_warps=16)
    mosts = torch.empty(rows, chunks, dtype=torch.float32, device=device)
    indices = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    totals = torch.empty(rows, chunks, dtype=torch.float64, device=device)
    _summarise[(rows, chunks)](
        *(logits, numbers, floors, mosts, indices, totals, stride, chunks),
        *(COLDEST, filtered, vocab, CHUNK),
        num_warps=8,
    )
    out = torch.empty(rows, dtype=torch.int64, device=device)
    _pick[(rows,)](
        *(logits, numbers, floors, mosts, indices, totals, out, stride, rows, chunks),
        *(COLDEST, filtered, vocab, CHUNK, triton.next_power_of_2(chunks)),
        num_warps=8,
    )
    return out
