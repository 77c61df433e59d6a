"""KV blocks as bytes, and through a whole rank: what was computed here is read there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.model_fixtures import GREEDY, generate, load_runner, random_tokens
from ullm.model.attention.varlen import VarlenAttention
from ullm.model.execution.runner import ModelRunner
from ullm.model.memory.kv_blocks import read_blocks, write_blocks
from ullm.model.memory.kv_pool import KvShape
from ullm.protocol.messages import NewSequence, ScheduledSequence, Step

PROMPT = random_tokens(40, seed=5)
BLOCKS = [3, 1, 7, 0, 8, 20, 21, 19, 30, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_arrive_bit_by_bit_in_other_places(dtype: torch.dtype) -> None:
    source = [torch.randn(6, 10).to(dtype), torch.randn(6, 4).to(dtype)]
    target = [torch.zeros_like(pool) for pool in source]
    content = read_blocks(source, [4, 0])
    assert len(content) == 2 * 14 * dtype.itemsize
    write_blocks(target, [1, 5], bytearray(content))
    for ours, theirs in zip(source, target, strict=True):
        assert torch.equal(theirs[[1, 5]], ours[[4, 0]])
        assert not theirs[[0, 2, 3, 4]].any()
    with pytest.raises(ValueError, match="27 bytes"):
        write_blocks(target, [1, 5], bytearray(27))


def test_the_pool_for_gpus_has_its_blocks_second() -> None:
    shape = KvShape(2, 2, 8, 4)
    pool = VarlenAttention(shape, 3, 256, torch.float32, torch.device("cpu"))
    pool.pools[1][1, 2].fill_(7.0)
    rows = pool.block_rows()
    assert [(len(part), bool(part[2].any())) for part in rows] == [(4, False)] * 3 + [(4, True)]
    write_blocks(rows, [0], bytearray(read_blocks(rows, [2])))
    assert bool((pool.pools[1][1, 0] == 7.0).all())


def prefilled(path: Path, **options: Any) -> ModelRunner:
    """Return a runner that has computed the prompt."""
    runner = load_runner(path, **options)
    new = NewSequence(1, PROMPT, len(PROMPT), GREEDY, BLOCKS)
    runner.submit(Step(1, [ScheduledSequence(1, 0, len(PROMPT), False)], [new])).result()
    return runner


@pytest.mark.parametrize("kernels", [False, True])
def test_a_rank_goes_on_from_what_another_one_has_computed(llama: tuple[Path, Any], kernels: bool) -> None:
    path, _ = llama
    expected = generate(load_runner(path, cpu_kernels=kernels), PROMPT, 12)
    source, target = (prefilled(path, cpu_kernels=kernels), load_runner(path, cpu_kernels=kernels))
    assert source._rank is not None
    assert target._rank is not None
    assert source._rank.info.kv_identity == target._rank.info.kv_identity != ""
    size = target._rank.info.block_size
    full = (len(PROMPT) - 1) // size
    there = [9, 2, 4, 5, 6, 0, 10, 11, 40, 41, 39, 38, 50]
    target.import_blocks(there[:full], bytearray(source.export_blocks(BLOCKS[:full])))
    assert target.export_blocks(there[:full]) == source.export_blocks(BLOCKS[:full])
    tokens, start = list(PROMPT), full * size
    new = [NewSequence(1, PROMPT, len(PROMPT), GREEDY, there, start)]
    for step_id in range(1, 13):
        row = ScheduledSequence(1, start, len(tokens) - start, True)
        (sampled,) = target.submit(Step(step_id, [row], new)).result().sampled
        start, new = len(tokens), []
        tokens += sampled.token_ids
    assert tokens[len(PROMPT) :] == expected


def test_kv_has_the_identity_of_its_weights_and_its_arithmetic(llama: tuple[Path, Any]) -> None:
    path, _ = llama

    def identity(**options: Any) -> str:
        runner = load_runner(path, **options)
        assert runner._rank is not None
        return runner._rank.info.kv_identity

    first = identity()
    assert identity() == first
    others = [identity(dtype="bfloat16"), identity(block_size=8), identity(cpu_kernels=False)]
    (weights,) = path.glob("*.safetensors")
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    try:
        others.append(identity())
    finally:
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len({first, *others}) == 5
    assert "" not in {first, *others}
