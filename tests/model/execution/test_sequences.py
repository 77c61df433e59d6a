"""From deltas to a layout."""

from __future__ import annotations

import pytest

from ullm.model.execution.sequences import BlockTables, SequenceTable
from ullm.protocol.messages import NewSequence, ScheduledSequence, Step
from ullm.sampling import SamplingParams


def table_of(*lengths: int, block_size: int = 4) -> SequenceTable:
    """Sequence i has the tokens 100 i, 100 i + 1, … and the blocks 10 i, 10 i + 1, …"""
    table = SequenceTable(block_size)
    for i, length in enumerate(lengths):
        blocks = [10 * i + b for b in range(-(-length // block_size))]
        table.add(NewSequence(i, [100 * i + t for t in range(length)], length, SamplingParams(), blocks))
    return table


def test_layout_of_a_mixed_step() -> None:
    table = table_of(6, 9, 12)
    plan = table.plan(
        Step(
            0,
            [
                ScheduledSequence(0, 2, 4, True),
                ScheduledSequence(1, 8, 1, True),
                ScheduledSequence(2, 9, 1, False),
            ],
        )
    )
    layout = plan.layout
    assert [row.seq_id for row, _ in plan.sequences] == [2, 1, 0]
    assert layout.token_ids.tolist() == [209, 108, 2, 3, 4, 5]
    assert layout.positions.tolist() == [9, 8, 2, 3, 4, 5]
    assert (layout.query_lens, layout.seq_lens, layout.num_decodes) == ([1, 1, 4], [10, 9, 6], 2)
    assert layout.block_tables.tolist() == [[20, 21, 22], [10, 11, 12], [0, 1, 0]]
    assert layout.slot_mapping.tolist() == [22 * 4 + 1, 12 * 4, 2, 3, 4, 5]
    assert (plan.ends, plan.device_only_tokens) == ([1, 2, 6], ([], []))


def test_tokens_that_only_the_device_knows() -> None:
    table = table_of(3, 4)
    state = table.sequences[1]
    state.num_sampled = 2
    plan = table.plan(Step(0, [ScheduledSequence(0, 0, 3, False), ScheduledSequence(1, 5, 1, True, [19])]))
    assert plan.layout.token_ids.tolist() == [0, 0, 1, 2]
    assert plan.device_only_tokens == ([0], [state.slot])
    assert plan.layout.slot_mapping.tolist()[0] == 19 * 4 + 1
    with pytest.raises(ValueError, match="only the last token sampled here is kept"):
        table.plan(Step(1, [ScheduledSequence(1, 4, 1, False)]))


def test_slots_are_reused() -> None:
    table = table_of(1, 1, 1)
    table.forget(1)
    table.forget(1)
    table.add(NewSequence(5, [7], 1, SamplingParams(), [0]))
    assert table.sequences[5].slot == 1
    assert table.num_slots == 3


def test_block_tables_grow() -> None:
    tables, expected = BlockTables(), [list[int]() for _ in range(20)]
    for first in range(0, 100, 5):
        for slot in range(20):
            ids = [slot * 1000 + first + i for i in range(5)]
            tables.put(slot, first, ids)
            expected[slot] += ids
    assert tables.rows(list(range(20)), 100).tolist() == expected
    tables.put(3, 0, [7])
    assert tables.rows([3, 1], 3).tolist() == [[7, 0, 0], expected[1][:3]]
