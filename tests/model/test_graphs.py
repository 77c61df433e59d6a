"""CUDA graphs' bookkeeping, which needs no GPU: sizes, padding, inputs."""

from __future__ import annotations

import pytest
import torch

from ullm.messages import NewSequence, Row, Step
from ullm.model.attention_varlen import VarlenAttention
from ullm.model.batch import KvShape
from ullm.model.graphs import fill, graph_sizes, padding_batch
from ullm.model.sequences import SequenceTable
from ullm.sampling import SamplingParams

SHAPE = KvShape(num_layers=1, num_kv_heads=2, head_dim=8, num_query_heads=4)


def test_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(30) == [1, 2, 4, 8, 16, 24, 30]


def test_padding_rows_live_in_the_padding_block() -> None:
    backend = VarlenAttention(SHAPE, 3, 4, torch.float32, torch.device("cpu"))
    assert backend.pools[0].shape == (2, 4, 4, 2, 8)
    inputs = padding_batch(backend, rows=5, width=2)
    assert inputs.slot_mapping.tolist() == [12] * 5
    table = SequenceTable(4)
    table.add(NewSequence(0, list(range(20, 26)), 6, SamplingParams(), [2, 1]))
    table.add(NewSequence(1, [9], 1, SamplingParams(), [0]))
    plan = table.plan(Step(0, [Row(1, 0, 1, False), Row(0, 5, 1, False)]))
    fill(inputs, backend.prepare(plan.layout), rows=2, size=4, backend=backend)
    assert inputs.token_ids[:2].tolist() == [25, 9]
    assert inputs.positions[:4].tolist() == [5, 0, 0, 0]
    assert inputs.seq_lens[:4].tolist() == [6, 1, 1, 1]
    assert inputs.block_tables[:4].tolist() == [[2, 1], [0, 0], [3, 3], [3, 3]]
    assert inputs.slot_mapping[:4].tolist() == [1 * 4 + 1, 0, 12, 12]


def test_attention_needs_the_batch_first() -> None:
    backend = VarlenAttention(SHAPE, 3, 4, torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="before it was prepared"):
        backend.unprepared()
