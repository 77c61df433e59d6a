"""Paged attention by gathering against the textbook formula, on scattered blocks."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ullm.model.attention.gather import GatherAttention, length_groups
from ullm.model.execution.sequences import SequenceTable
from ullm.model.memory.kv_pool import KvShape
from ullm.protocol.messages import NewSequence, ScheduledSequence, Step
from ullm.sampling import SamplingParams

SHAPE = KvShape(num_layers=2, num_kv_heads=2, head_dim=8, num_query_heads=6)
BLOCK, BLOCKS = 4, 200
CPU = torch.device("cpu")


def textbook(q: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None) -> Tensor:
    """One query ``[heads, D]`` over ``keys [L, KV heads, D]``."""
    groups = q.shape[0] // keys.shape[1]
    scores = torch.einsum("hd,lhd->hl", q, keys.repeat_interleave(groups, 1)) / math.sqrt(q.shape[1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if window is not None:
        scores[:, : max(len(keys) - window, 0)] = -torch.inf
    return torch.einsum("hl,lhd->hd", torch.softmax(scores, -1), values.repeat_interleave(groups, 1))


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_random_steps(window: int | None, softcap: float | None, seed: int) -> None:
    """Sequences of random lengths advance by random counts, decodes and chunks mixed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    backend, table = GatherAttention(SHAPE, BLOCKS, BLOCK, torch.float32, CPU), SequenceTable(BLOCK)
    free = rng.sample(range(BLOCKS), BLOCKS)
    lengths = [rng.choice((1, 3, 17, 60)) for _ in range(6)]
    for seq_id, length in enumerate(lengths):
        blocks = [free.pop() for _ in range(-(-length // BLOCK))]
        table.add(NewSequence(seq_id, [1] * length, length, SamplingParams(), blocks))
    history = [
        [(torch.empty(0, 2, 8), torch.empty(0, 2, 8)) for _ in lengths] for _ in range(SHAPE.num_layers)
    ]
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        rows = [
            ScheduledSequence(i, done[i], min(rng.choice((1, 1, 7)), n - done[i]), False)
            for i, n in enumerate(lengths)
            if done[i] < n
        ]
        plan = table.plan(Step(0, rows))
        batch = backend.prepare(plan.layout)
        for layer in range(SHAPE.num_layers):
            q, k, v = (torch.randn(plan.ends[-1], heads, 8) for heads in (6, 2, 2))
            out = batch.attention(layer, q, k, v, 8**-0.5, window, softcap)
            for (row, _), end in zip(plan.sequences, plan.ends, strict=True):
                keys, values = history[layer][row.seq_id]
                for token in range(end - row.count, end):
                    keys, values = torch.cat((keys, k[token, None])), torch.cat((values, v[token, None]))
                    expected = textbook(q[token], keys, values, window, softcap)
                    torch.testing.assert_close(out[token], expected, atol=1e-5, rtol=1e-4)
                history[layer][row.seq_id] = keys, values
        for row in rows:
            done[row.seq_id] += row.count
            if window is not None:  # what is behind it may be another's, and not even a number
                behind = max(0, done[row.seq_id] + 1 - window) // BLOCK
                slot = table.sequences[row.seq_id].slot
                lost = table._blocks.rows([slot], behind)[0] if behind else []
                for layer in range(SHAPE.num_layers):
                    backend.pages[layer].view(BLOCKS, -1)[lost] = torch.nan


def test_unused_pool_occupies_nothing() -> None:
    """A pool of 4 GiB costs next to nothing until its blocks are written."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    large = KvShape(num_layers=4, num_kv_heads=2, head_dim=64, num_query_heads=2)
    backend = GatherAttention(large, 1 << 17, 16, torch.bfloat16, CPU)
    assert sum(pool.nbytes for pool in backend.pages) == 4 << 30
    assert resident() - before < 64 << 20
    backend.release()


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=70), st.integers(0, 5000))
def test_groups_cover_all_and_waste_little(lens: list[int], cost: int) -> None:
    lens.sort(reverse=True)
    groups = length_groups(lens, cost)
    assert [i for start, end in groups for i in range(start, end)] == list(range(len(lens)))
    padded = sum((end - start) * lens[start] for start, end in groups)
    assert padded <= lens[0] * len(lens)
    for start, end in groups:
        assert all((lens[start] - lens[i]) * (len(lens) - i) <= cost for i in range(start, end))


def test_no_decodes_no_groups() -> None:
    assert length_groups([], 10) == []


def test_fresh_pool_is_zero_not_nan() -> None:
    backend = GatherAttention(SHAPE, 3, BLOCK, torch.bfloat16, CPU)
    assert all(not pool.any() for pool in backend.pages)
    assert np.prod(backend.pages[0].shape) == 3 * 2 * 2 * BLOCK * 8
