"""CUDA graphs without CUDA: their sizes, padding and inputs, and the calls of attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.model.fake_cuda import FakeCuda
from tests.model.model_fixtures import (
    GREEDY,
    load_runner,
    random_tokens,
    reference_greedy,
    save_tiny,
    step_by_step,
)
from ullm.errors import ModelUnsupported
from ullm.model.attention.varlen import CAUSAL, FULL, SequenceGroup, VarlenAttention
from ullm.model.execution.graphs import HEADER, fill, graph_reaches, graph_sizes, pad
from ullm.model.execution.sequences import SequenceTable
from ullm.model.memory.kv_pool import KvShape
from ullm.model.memory.upload import move, upload
from ullm.protocol.messages import NewSequence, ScheduledSequence, Step
from ullm.sampling import SamplingParams

SHAPE = KvShape(num_layers=1, num_kv_heads=2, head_dim=8, num_query_heads=4)


def test_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(30) == [1, 2, 4, 8, 16, 24, 30]


def test_small_batches_have_graphs_for_short_sequences() -> None:
    assert graph_reaches(1, 40960, kv_heads=8, processors=132) == [1024, 4096, 16384, 40960]
    assert graph_reaches(32, 4096, kv_heads=8, processors=132) == [1024, 4096]
    assert graph_reaches(40, 40960, kv_heads=8, processors=132) == [40960]
    assert graph_reaches(1, 512, kv_heads=8, processors=132) == [512]


def test_padding_rows_live_in_the_padding_block() -> None:
    table = SequenceTable(4)
    table.add(NewSequence(0, list(range(20, 26)), 6, SamplingParams(), [2, 1]))
    table.add(NewSequence(1, [9], 1, SamplingParams(), [0]))
    plan = table.plan(Step(0, [ScheduledSequence(1, 0, 1, False), ScheduledSequence(0, 5, 1, False)]))
    header, tables = np.zeros((HEADER, 4), np.int32), np.zeros((4, 2), np.int32)
    pad(header, tables, padding_block=3, block_size=4)
    fill(header, tables, plan.layout, ([1], [7]), slots=10)
    assert header.tolist() == [[25, 9, 0, 0], [5, 0, 0, 0], [6, 1, 1, 1], [5, 0, 12, 12], [10, 7, 0, 0]]
    assert tables.tolist() == [[2, 1], [0, 0], [3, 3], [3, 3]]


def test_the_pool_has_a_block_for_padding() -> None:
    backend = VarlenAttention(SHAPE, 3, 4, torch.float32, torch.device("cpu"))
    assert backend.pools[0].shape == (2, 4, 4, 2, 8)
    assert backend.padding_block == 3


def part(max_query_len: int, max_seq_len: int) -> SequenceGroup:
    nothing = torch.zeros(1, dtype=torch.int32)
    return SequenceGroup(nothing, nothing, nothing, 1, max_query_len, max_seq_len)


def test_one_query_per_sequence_has_no_window() -> None:
    """Else the kernel would read keys once for each query head."""
    assert part(1, 100).window(None) == FULL
    assert part(2, 100).window(None) == CAUSAL
    assert part(1, 100).window(100) == FULL
    assert part(1, 100).window(99) == (98, 0)
    assert part(2, 100).window(200) == CAUSAL


def test_uploads_are_packed_into_one_copy() -> None:
    arrays = [np.arange(3), np.array([[1, 2], [3, 4], [5, 6]], np.int32)[:, :1], np.array([0.5])]
    for found in (move(torch.device("cpu"), arrays, pinned=False), upload(torch.device("cpu"), *arrays)):
        assert [tensor.dtype for tensor in found] == [torch.int64, torch.int32, torch.float64]
        assert [tensor.tolist() for tensor in found] == [[0, 1, 2], [[1], [3], [5]], [0.5]]
    packed = move(torch.device("cpu"), arrays, pinned=False)
    assert len({tensor.untyped_storage().data_ptr() for tensor in packed}) == 1


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "llama", "mistral", "qwen2-windows"])
def test_tokens_are_transformers(name: str, graphs: bool, tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, name)
    prompts = [random_tokens(length, seed=length) for length in (5, 1, 9, 6)]
    cuda = FakeCuda(tmp_path, graphs=graphs)
    found = step_by_step(cuda.runner, prompts, 16)
    assert found == [reference_greedy(reference, p, len(f)) for p, f in zip(prompts, found, strict=True)]
    assert bool(cuda.replays) == graphs


def test_mixed_steps_attend_for_decodes_apart(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    cuda = FakeCuda(tmp_path, graphs=False)
    runner = cuda.runner
    runner.submit(
        Step(0, [ScheduledSequence(0, 0, 3, True)], [NewSequence(0, [5, 6, 7], 3, GREEDY, [0, 1])])
    ).result()
    assert set(cuda.kernel.calls) == {(1, 3, 3, CAUSAL)}
    cuda.kernel.calls.clear()
    new = [NewSequence(1, list(range(9, 15)), 6, GREEDY, [2, 3])]
    runner.submit(
        Step(1, [ScheduledSequence(1, 0, 5, False), ScheduledSequence(0, 3, 1, True)], new)
    ).result()
    assert cuda.kernel.calls == [(1, 1, 4, FULL), (1, 5, 5, CAUSAL)] * 3


def test_the_graph_fits_the_batch_and_its_longest_sequence(tmp_path: Path) -> None:
    save_tiny(
        tmp_path,
        "qwen3",
    )
    options = {"num_blocks": 520, "block_size": 4, "context_len": 2000}
    cuda = FakeCuda(tmp_path, graphs=True, processors=5, **options)
    assert sorted(cuda.graphs) == [(1, 256), (2, 256), (4, 256), (8, 256)]  # the model's own limit
    prompts = [random_tokens(4, seed=i) for i in range(3)]
    new = [NewSequence(i, p, 4, GREEDY, [2 * i, 2 * i + 1]) for i, p in enumerate(prompts)]
    cuda.runner.submit(Step(0, [ScheduledSequence(i, 0, 4, True) for i in range(3)], new)).result()
    assert not cuda.replays
    cuda.runner.submit(Step(1, [ScheduledSequence(i, 4, 1, True) for i in range(3)])).result()
    assert cuda.replays == {(4, 256): 1}
    cuda.runner.submit(Step(2, [ScheduledSequence(2, 5, 1, True)])).result()
    assert cuda.replays == {(4, 256): 1, (1, 256): 1}


def test_a_longer_reach_is_taken_when_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ullm.model.execution.graphs.FIRST_REACH", 8)
    reference = save_tiny(tmp_path, "qwen3")
    prompt = random_tokens(5, seed=1)
    cuda = FakeCuda(tmp_path, graphs=True, num_blocks=16)
    assert [reach for size, reach in cuda.graphs if size == 1] == [8, 32, 64]
    new = [NewSequence(0, prompt, 5, GREEDY, list(range(16)))]
    found = cuda.runner.submit(Step(0, [ScheduledSequence(0, 0, 5, True)], new)).result().sampled[0].token_ids
    for start in range(5, 40):
        found += (
            cuda.runner.submit(Step(start, [ScheduledSequence(0, start, 1, True)]))
            .result()
            .sampled[0]
            .token_ids
        )
    assert found == reference_greedy(reference, prompt, 36)
    assert cuda.replays == {(1, 8): 3, (1, 32): 24, (1, 64): 8}


def test_a_step_ahead_takes_tokens_that_the_host_has_not_seen(tmp_path: Path) -> None:
    """And one that is resumed takes its own: its last token was sent with it."""
    reference, prompts = save_tiny(tmp_path, "llama"), [random_tokens(4, seed=i) for i in range(2)]
    cuda = FakeCuda(tmp_path, graphs=True)
    new = [NewSequence(0, prompts[0], 4, GREEDY, [0, 1, 2]), NewSequence(1, prompts[1], 4, GREEDY, [3, 4, 5])]
    first = cuda.runner.submit(
        Step(0, [ScheduledSequence(0, 0, 4, True), ScheduledSequence(1, 0, 3, False)], new)
    )
    second = cuda.runner.submit(Step(1, [ScheduledSequence(0, 4, 1, True), ScheduledSequence(1, 3, 1, True)]))
    third = cuda.runner.submit(Step(2, [ScheduledSequence(1, 4, 1, True), ScheduledSequence(0, 5, 1, True)]))
    found: dict[int, list[int]] = {0: [], 1: []}
    for pending in (first, second, third):
        for sampled in pending.result().sampled:
            found[sampled.seq_id] += sampled.token_ids
    assert found[0] == reference_greedy(reference, prompts[0], 3)
    assert found[1] == reference_greedy(reference, prompts[1], 2)
    assert cuda.replays == {(2, 256): 2}


def test_more_sequences_than_slots_are_computed_without_graphs(tmp_path: Path) -> None:
    """A graph would read the old slots."""
    save_tiny(tmp_path, "llama")
    cuda, plain = FakeCuda(tmp_path, graphs=True, max_bs=2), load_runner(tmp_path, max_bs=2)
    prompts = [random_tokens(3, seed=i) for i in range(6)]
    found = []
    for runner in (cuda.runner, plain):
        new = [NewSequence(i, p, 3, GREEDY, [2 * i, 2 * i + 1]) for i, p in enumerate(prompts)]
        runner.submit(Step(0, [ScheduledSequence(i, 0, 3, True) for i in range(6)], new)).result()
        found.append(
            runner.submit(Step(1, [ScheduledSequence(4, 3, 1, True), ScheduledSequence(5, 3, 1, True)]))
            .result()
            .sampled
        )
    assert found[0] == found[1]
    assert not cuda.replays


def test_softcaps_are_refused() -> None:
    backend = VarlenAttention(SHAPE, 3, 4, torch.float32, torch.device("cpu"))
    table = SequenceTable(4)
    table.add(NewSequence(0, [9], 1, SamplingParams(), [0]))
    batch = backend.prepare(table.plan(Step(0, [ScheduledSequence(0, 0, 1, False)])).layout)
    nothing = torch.zeros(1, 2, 8)
    with pytest.raises(ModelUnsupported, match="soft-capped"):
        batch.attention(0, nothing, nothing, nothing, 1.0, None, 30.0)
