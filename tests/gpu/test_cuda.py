"""The same answers on a GPU: varlen attention, CUDA graphs, steps in flight. Skipped without CUDA."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.model.fake_cuda import Calls
from tests.model.kernel_checks import check_choice
from tests.model.model_fixtures import (
    GREEDY,
    MODELS,
    SHAPE,
    config,
    generate,
    load_runner,
    random_tokens,
    reference_greedy,
    save_tiny,
)
from ullm.model.architectures.decoder import Decoder
from ullm.model.attention.varlen import SequenceGroup, VarlenAttention, VarlenStep
from ullm.model.execution.runner import ModelRunner
from ullm.model.kernels.cuda.decode_choice import SplitDecode, random_group
from ullm.model.kernels.cuda.ops import FusedOps
from ullm.model.memory.kv_pool import KvShape
from ullm.protocol.messages import NewSequence, RankSpec, ScheduledSequence, Start, Step
from ullm.sampling import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_GPU: dict[str, Any] = {"device": "cuda", "num_blocks": 16, "block_size": 256}


@pytest.mark.parametrize("name", list(MODELS))
def test_float32_equals_transformers(name: str, tmp_path: Path) -> None:
    reference, prompt = save_tiny(tmp_path, name), random_tokens(13, seed=1)
    runner = load_runner(tmp_path, **ON_GPU)
    assert generate(runner, prompt, 20, chunk=5) == reference_greedy(reference, prompt, 20)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-windows", "qwen3"])
def test_graphs_equal_eager(name: str, fused: bool, tmp_path: Path) -> None:
    """bfloat16 goes through varlen attention; decode steps of 1, 3 and 8 sequences through padded graphs."""
    save_tiny(tmp_path, name)
    prompts = [random_tokens(5 + i, seed=i) for i in range(8)]
    found = []
    for eager in (True, False):
        options = ON_GPU | {"dtype": "bfloat16", "gpu_kernels": fused}
        runner = load_runner(tmp_path, **options, enforce_eager=eager)
        if fused:  # the same one, however close the measurements were
            fix_attention(runner)
        found.append({count: decode(runner, prompts[:count]) for count in (1, 3, 8)})
    assert found[0] == found[1]


@pytest.mark.parametrize("eager", [True, False])
def test_no_step_waits_for_the_device(eager: bool, tmp_path: Path) -> None:
    """Whatever is sampled, and however prompts mix with decodes: PyTorch raises where the host would wait."""
    save_tiny(tmp_path, "qwen3")
    runner = load_runner(tmp_path, **ON_GPU, dtype="bfloat16", enforce_eager=eager)
    params = [
        SamplingParams(temperature=0, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=1, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, seed=2, ignore_eos=True),
        SamplingParams(temperature=0.8, top_k=20, min_p=0.01, seed=3, ignore_eos=True),
        SamplingParams(temperature=0, repetition_penalty=1.2, frequency_penalty=0.1, ignore_eos=True),
        SamplingParams(temperature=0, logit_bias={5: 1.0}, min_tokens=3),
        SamplingParams(temperature=0, logprobs=3, ignore_eos=True),
    ]
    found = []
    for mode in ("default", "error"):  # what is done once may wait
        pending = []
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for number in range(12):
                pending.append(runner.submit(arriving(number, params)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append([each.result().sampled for each in pending])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama-bias", "llama-head-dim", "qwen3"])
def test_fused_kernels_work_here(name: str, tmp_path: Path) -> None:
    """Compiled, found to agree with PyTorch, and as near the CPU as PyTorch is."""
    save_tiny(tmp_path, name)
    prompts = [random_tokens(9, seed=i) for i in range(8)]
    cpu = decode(load_runner(tmp_path, block_size=256, num_blocks=16), prompts, steps=1)
    for fused in (True, False):
        runner = load_runner(tmp_path, **ON_GPU, dtype="bfloat16", gpu_kernels=fused)
        assert runner._rank is not None
        model = runner._rank.model
        assert isinstance(model, Decoder)
        assert isinstance(model.ops, FusedOps) == fused
        found = decode(runner, prompts, steps=1)
        assert sum(a == b for a, b in zip(found, cpu, strict=True)) >= 6, (fused, found, cpu)


@pytest.mark.parametrize("shape", [KvShape(1, 8, 128, 16), KvShape(1, 3, 64, 9), KvShape(1, 1, 80, 8)])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_of_decodes_is_flash_attention(shape: KvShape, window: int | None) -> None:
    """With every tiling, few sequences that are split and many that are not."""
    from ullm.model.kernels.cuda import decode as kernels

    device = torch.device("cuda")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    backend = VarlenAttention(shape, 40, 256, torch.bfloat16, device)
    for count in (1, 3, 300):
        part = random_group(backend, count)
        q = torch.randn(count, shape.num_query_heads, shape.head_dim, device=device).bfloat16()
        expected = VarlenStep(backend, part.query_start, [part]).attend(0, q, 0.1, window)
        for tiling in kernels.TILINGS:
            found = SplitDecode(kernels, tiling, processors)(q, backend.pools[0], part, 0.1, window)
            torch.testing.assert_close(found, expected, atol=0.01, rtol=0.02)


def test_the_fastest_attention_is_chosen_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever it is, it is measured, and none disagrees."""
    save_tiny(tmp_path, "qwen3")
    with caplog.at_level("INFO"):
        load_runner(tmp_path, **ON_GPU, dtype="bfloat16")
    said = [record.getMessage() for record in caplog.records]
    assert sum("attention for decodes" in line for line in said) == 2
    assert not any("disagree" in line or "Flash Attention" in line for line in said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_chosen_as_by_pytorch(dtype: torch.dtype) -> None:
    from ullm.model.kernels.cuda import choose

    check_choice(lambda logits, *rest: choose.choose_tokens(logits.cuda(), *rest).cpu(), dtype)


def fix_attention(runner: ModelRunner) -> None:
    """Let the first tiling attend for all decodes, and capture again."""
    from ullm.model.kernels.cuda import decode as kernels

    rank = runner._rank
    assert rank is not None
    assert isinstance(rank.backend, VarlenAttention)
    processors = torch.cuda.get_device_properties(rank.context.device).multi_processor_count
    first = SplitDecode(kernels, kernels.TILINGS[0], processors)
    rank.backend.choose_decode = lambda count: first
    if rank.graphs is not None:
        rank.graphs.release()
        with torch.inference_mode():
            rank.graphs.capture(lambda: None)


def arriving(number: int, params: list[SamplingParams]) -> Step:
    """One prompt of 6 tokens begins with each step, in chunks of 4, beside those that decode by now."""
    rows, new = [], []
    for i, each in enumerate(params[: number + 1]):
        start = (0, 4)[number - i] if number - i < 2 else 6 + number - i - 2
        if number == i:
            prompt = random_tokens(6, seed=i)
            new.append(NewSequence(i, prompt, len(prompt), each, [2 * i, 2 * i + 1]))
        count = (4, 2)[number - i] if number - i < 2 else 1
        rows.append(ScheduledSequence(i, start, count, number > i))
    return Step(number, rows, new, released=list(range(len(params))) if number == 0 else [])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_the_kernel_is_what_its_stand_in_is(name: str, tmp_path: Path) -> None:
    """Without a window for one query, for decodes beside chunks, and for sequences that a graph splits."""
    save_tiny(tmp_path, name)
    runner = load_runner(tmp_path, **ON_GPU, dtype="bfloat16")
    rank = runner._rank
    assert rank is not None
    assert isinstance(rank.backend, VarlenAttention)
    real, fake, pairs = rank.backend.kernel, Calls(), []

    def both(
        q: torch.Tensor, pool: torch.Tensor, group: SequenceGroup, key_start: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        out = real(q, pool, group, key_start, *rest)
        on_cpu = dataclasses.replace(
            group,
            query_start=group.query_start.cpu(),
            seq_lens=group.seq_lens.cpu(),
            block_tables=group.block_tables.cpu(),
        )
        expected = fake(q.cpu().float(), pool.cpu().float(), on_cpu, key_start.cpu(), *rest)
        pairs.append((out.float().cpu(), expected))
        return out

    rank.backend.kernel, rank.backend.choose_decode, rank.graphs = both, None, None
    new = [
        NewSequence(i, random_tokens(200 + i, seed=i), 200 + i, GREEDY, [2 * i, 2 * i + 1]) for i in range(3)
    ]
    runner.submit(
        Step(0, [ScheduledSequence(0, 0, 200, True), ScheduledSequence(1, 0, 200, False)], new[:2])
    ).result()
    runner.submit(
        Step(
            1,
            [
                ScheduledSequence(0, 200, 1, True),
                ScheduledSequence(1, 200, 1, True),
                ScheduledSequence(2, 0, 150, False),
            ],
            new[2:],
        )
    ).result()
    runner.submit(Step(2, [ScheduledSequence(0, 201, 1, True), ScheduledSequence(1, 201, 1, True)])).result()
    assert {call[1] for call in fake.calls} == {1, 150, 200}
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_bfloat16_is_near_the_cpu(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    prompts = [random_tokens(300 if i == 0 else 9, seed=i)[:250] for i in range(3)]
    gpu = decode(load_runner(tmp_path, **ON_GPU, dtype="bfloat16"), prompts, steps=1)
    cpu = decode(load_runner(tmp_path, block_size=256, num_blocks=16), prompts, steps=1)
    agreements = sum(a == b for a, b in zip(gpu, cpu, strict=True))
    assert agreements >= 2, (gpu, cpu)


def test_pool_size_follows_the_utilization(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    blocks = []
    for share in (0.1, 0.2):
        runner = ModelRunner()
        options = ON_GPU | {"num_blocks": None, "gpu_memory_utilization": share, "dtype": "bfloat16"}
        start = Start(config(tmp_path, **options), RankSpec(device_index=0), str(tmp_path))
        info = runner.load(start, lambda _: None)
        assert info.block_size == 256
        blocks.append(info.num_blocks)
        runner.close()
    assert blocks[1] > 1.5 * blocks[0] > 0
    assert torch.cuda.memory_allocated() < 64 << 20


@pytest.mark.parametrize("levels", [[1], [2], [1, 2]])
@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "enforce_eager": True}, {"dtype": "float32"}]
)
@pytest.mark.parametrize("name", ["llama-tied", "qwen3-bias"])
def test_output_after_a_sleep_is_as_before(
    name: str, options: dict[str, Any], levels: list[int], tmp_path: Path
) -> None:
    save_tiny(tmp_path, name)
    prompts = [random_tokens(5 + i, seed=i) for i in range(8)]
    runner = load_runner(tmp_path, **ON_GPU | options)
    expected = decode(runner, prompts)
    for _ in range(2):
        for level in levels:
            runner.sleep(level)
        runner.wake(lambda _: None)
        assert decode(runner, prompts) == expected
    runner.close()


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_foreign_model_sleeps(load_format: str, tmp_path: Path) -> None:
    shape = SHAPE | {"intermediate_size": 128, "initializer_range": 0.2}
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape)).save_pretrained(tmp_path)
    runner = load_runner(tmp_path, **ON_GPU, dtype="bfloat16", load_format=load_format)
    expected = decode(runner, [random_tokens(9, seed=1)])
    for level in (1, 2):
        runner.sleep(level)
        runner.wake(lambda _: None)
        assert decode(runner, [random_tokens(9, seed=1)]) == expected


def test_sleep_gives_the_device_back(tmp_path: Path) -> None:
    """Driver and report agree on the freed memory; awake again, there are as many blocks as before."""
    shape = SHAPE | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(tmp_path)
    runner = ModelRunner()
    options = ON_GPU | {"num_blocks": None, "gpu_memory_utilization": 0.1, "dtype": "bfloat16"}
    start = Start(config(tmp_path, **options), RankSpec(device_index=0), str(tmp_path))
    info = runner.load(start, lambda _: None)
    pool = info.num_blocks * info.block_size * info.kv_bytes_per_token
    free_awake = torch.cuda.mem_get_info()[0]
    for level in (1, 2):
        freed_bytes = runner.sleep(level)
        assert list(freed_bytes) == ["graphs", "kv_cache", "weights"]
        assert freed_bytes["kv_cache"] >= pool
        assert freed_bytes["weights"] >= 0.9 * info.weight_bytes
        grown = torch.cuda.mem_get_info()[0] - free_awake
        assert grown >= 0.95 * (pool + info.weight_bytes)
        assert abs(grown - sum(freed_bytes.values())) < 64 << 20
        assert runner.wake(lambda _: None) == info
        assert abs(torch.cuda.mem_get_info()[0] - free_awake) < 64 << 20
    runner.close()


def decode(runner: ModelRunner, prompts: list[list[int]], steps: int = 12) -> list[list[int]]:
    """Greedy tokens of several sequences, each step submitted before the last one's result is taken."""
    new = [
        NewSequence(i, prompt, len(prompt), GREEDY, [2 * i, 2 * i + 1]) for i, prompt in enumerate(prompts)
    ]
    rows = [ScheduledSequence(i, 0, len(prompt), True) for i, prompt in enumerate(prompts)]
    pending = [runner.submit(Step(0, rows, new, released=list(range(8))))]
    found: list[list[int]] = [[] for _ in prompts]
    for step in range(1, steps + 1):
        if step < steps:
            rows = [ScheduledSequence(i, len(prompt) + step - 1, 1, True) for i, prompt in enumerate(prompts)]
            pending.append(runner.submit(Step(step, rows)))
        for sampled in pending.pop(0).result().sampled:
            found[sampled.seq_id] += sampled.token_ids
    return found
