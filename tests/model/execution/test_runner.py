"""Steps through `ModelRunner`: greedy equality with transformers, one step ahead, logprobs, errors."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.model.model_fixtures import (
    GREEDY,
    SHAPE,
    VOCAB,
    config,
    generate,
    load_runner,
    random_tokens,
    reference_greedy,
    reference_logits,
    save_tiny,
)
from ullm.errors import OutOfMemory
from ullm.model.architectures import registry
from ullm.model.execution.runner import ModelRunner
from ullm.protocol.messages import NewSequence, Progress, RankSpec, ScheduledSequence, Start, Step


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_equals_transformers(name: str, tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, name)
    prompt = random_tokens(13, seed=1)
    expected = reference_greedy(reference, prompt, 30)
    assert generate(load_runner(tmp_path), prompt, 30) == expected
    assert generate(load_runner(tmp_path), prompt, 30, chunk=5) == expected


def test_many_sequences_come_and_go(llama: tuple[Path, Any]) -> None:
    """Five sequences admitted one by one, each with its chunks, while the earlier ones decode."""
    path, reference = llama
    runner = load_runner(path)
    prompts = [random_tokens(count, seed) for seed, count in enumerate((9, 1, 20, 6, 13))]
    found: list[list[int]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for step_id in range(40):
        rows, new = [], []
        for seq_id, prompt in enumerate(prompts[: 1 + step_id // 3]):
            if len(found[seq_id]) == 15:
                continue
            if done[seq_id] == 0:
                blocks = list(range(seq_id * 9, seq_id * 9 + 9))
                new.append(NewSequence(seq_id, prompt, len(prompt), GREEDY, blocks))
            count = min(7, len(prompt) + len(found[seq_id]) - done[seq_id])
            sample = done[seq_id] + count == len(prompt) + len(found[seq_id])
            rows.append(ScheduledSequence(seq_id, done[seq_id], count, sample))
            done[seq_id] += count
        for sampled in runner.submit(Step(step_id, rows, new)).result().sampled:
            found[sampled.seq_id] += sampled.token_ids
    assert found == [reference_greedy(reference, prompt, 15) for prompt in prompts]


def test_one_step_ahead(llama: tuple[Path, Any]) -> None:
    """The second step is submitted before the first one's result is taken."""
    path, reference = llama
    runner, prompt = load_runner(path), random_tokens(6, seed=3)
    new = [NewSequence(7, prompt, 6, GREEDY, [4, 2])]
    pending = [
        runner.submit(Step(0, [ScheduledSequence(7, 0, 6, True)], new)),
        runner.submit(Step(1, [ScheduledSequence(7, 6, 1, True)])),
    ]
    pending.append(runner.submit(Step(2, [ScheduledSequence(7, 7, 1, True)])))
    pending.append(runner.submit(Step(3, [ScheduledSequence(7, 8, 1, True, [30])])))
    assert all(step.done() for step in pending)
    tokens = [step.result().sampled[0].token_ids[0] for step in pending]
    assert tokens == reference_greedy(reference, prompt, 4)


def test_preempted_sequence_resumes(llama: tuple[Path, Any]) -> None:
    path, reference = llama
    runner, prompt = load_runner(path), random_tokens(8, seed=5)
    expected = reference_greedy(reference, prompt, 6)
    assert generate(runner, prompt, 3) == expected[:3]
    resumed = prompt + expected[:3]
    again = NewSequence(0, resumed, len(prompt), GREEDY, [20, 21, 22, 23])
    result = runner.submit(Step(1, [ScheduledSequence(0, 0, 11, True)], [again], released=[0, 99])).result()
    assert result.sampled[0].token_ids == expected[3:4]
    result = runner.submit(Step(2, [ScheduledSequence(0, 11, 1, True)])).result()
    assert result.sampled[0].token_ids == expected[4:5]


def test_more_sequences_than_expected_get_slots(llama: tuple[Path, Any]) -> None:
    path, reference = llama
    runner = load_runner(path, max_bs=1)
    prompts = [random_tokens(3, seed) for seed in range(5)]
    new = [NewSequence(i, prompt, 3, GREEDY, [i * 2, i * 2 + 1]) for i, prompt in enumerate(prompts)]
    steps = [
        Step(0, [ScheduledSequence(i, 0, 3, True) for i in range(5)], new),
        Step(1, [ScheduledSequence(i, 3, 1, True) for i in range(5)]),
    ]
    found = [[s.token_ids[0] for s in runner.submit(step).result().sampled] for step in steps]
    assert list(map(list, zip(*found, strict=True))) == [reference_greedy(reference, p, 2) for p in prompts]


def test_logprobs(llama: tuple[Path, Any]) -> None:
    path, reference = llama
    runner, prompt = load_runner(path), random_tokens(10, seed=6)
    params = dataclasses.replace(GREEDY, logprobs=2, prompt_logprobs=3)
    new = [NewSequence(0, prompt, 10, params, [0, 1, 2]), NewSequence(1, prompt, 10, GREEDY, [5, 6, 7])]
    first = runner.submit(
        Step(0, [ScheduledSequence(0, 0, 6, False), ScheduledSequence(1, 0, 10, True)], new)
    ).result()
    second = runner.submit(Step(1, [ScheduledSequence(0, 6, 4, True)])).result()
    expected = torch.log_softmax(reference_logits(reference, prompt), -1)
    assert [(s.seq_id, len(s.token_ids)) for s in first.sampled] == [(0, 0), (1, 1)]
    assert first.sampled[1].logprobs is None
    assert first.sampled[1].prompt_logprobs is None
    found = [*(first.sampled[0].prompt_logprobs or []), *(second.sampled[0].prompt_logprobs or [])]
    assert [entry.token_id for entry in found] == prompt[1:]
    for position, entry in enumerate(found):
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
        assert len(entry.top) == 3
    (own,) = second.sampled[0].logprobs or []
    assert [own.token_id] == second.sampled[0].token_ids == [int(expected[-1].argmax())]
    assert own.logprob == pytest.approx(float(expected[-1].max()), abs=1e-4)
    assert own.rank == 1
    assert len(own.top) == 2


def test_rows_without_samples_answer_nothing(llama: tuple[Path, Any]) -> None:
    runner = load_runner(llama[0])
    assert runner.submit(Step(5, [])).result().sampled == []
    new = [NewSequence(0, [3, 4, 5], 3, GREEDY, [0])]
    result = runner.submit(Step(6, [ScheduledSequence(0, 0, 2, False)], new)).result()
    assert (result.step_id, result.sampled) == (6, [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ScheduledSequence(1, 0, 1, False), "sequence 1, which is not known"),
        (ScheduledSequence(0, 0, 0, False), "0 tokens from 0 are scheduled"),
        (ScheduledSequence(0, -1, 2, False), "2 tokens from -1"),
        (ScheduledSequence(0, 2, 4, False), "it has 5"),
        (ScheduledSequence(0, 0, 5, True), "5 tokens do not fit its 1 blocks of 4"),
        (ScheduledSequence(0, 0, 4, True), "sampling after token 4 of 5"),
    ],
)
def test_impossible_rows_are_refused(llama: tuple[Path, Any], row: ScheduledSequence, message: str) -> None:
    runner = load_runner(llama[0])
    new = [NewSequence(0, [3, 4, 5, 6, 7], 5, GREEDY, [0])]
    with pytest.raises(ValueError, match=message):
        runner.submit(Step(0, [row], new))


def test_a_known_sequence_is_not_taken_up_again(llama: tuple[Path, Any]) -> None:
    runner = load_runner(llama[0])
    new = NewSequence(0, [3], 1, GREEDY, [0])
    runner.submit(Step(0, [], [new]))
    with pytest.raises(ValueError, match="known already"):
        runner.submit(Step(1, [], [new]))
    with pytest.raises(ValueError, match="no tokens"):
        runner.submit(Step(1, [], [NewSequence(1, [], 0, GREEDY, [0])]))


def test_info_and_progress(llama: tuple[Path, Any]) -> None:
    path, reference = llama
    seen: list[Progress] = []
    runner = ModelRunner()
    info = runner.load(Start(config(path), RankSpec(), str(path)), seen.append)
    assert [p.stage for p in seen] == ["load", "profile", "warmup"]
    parameters = sum(p.numel() for p in reference.parameters())
    assert (info.architecture, info.num_parameters, info.vocab_size) == (
        "LlamaForCausalLM",
        parameters,
        VOCAB,
    )
    assert (info.eos_token_ids, info.context_len) == ((SHAPE["eos_token_id"],), 256)
    assert (info.num_blocks, info.block_size, info.dtype, info.device) == (64, 4, "float32", "cpu")
    assert info.kv_bytes_per_token == 2 * 3 * 2 * 16 * 4
    assert info.weight_bytes == parameters * 4


def test_small_pool_limits_the_context(llama: tuple[Path, Any]) -> None:
    runner = ModelRunner()
    info = runner.load(Start(config(llama[0], num_blocks=5), RankSpec(), str(llama[0])), lambda _: None)
    assert (info.num_blocks, info.context_len) == (5, 20)


def test_no_memory_for_one_block(llama: tuple[Path, Any]) -> None:
    with pytest.raises(OutOfMemory, match="not enough memory for one block of KV"):
        load_runner(llama[0], num_blocks=None, kv_cache_memory=100)


def test_a_pool_that_cannot_be_filled(llama: tuple[Path, Any]) -> None:
    with pytest.raises(OutOfMemory, match=r"the KV cache of \d+ blocks needs .* MiB, there are .* MiB"):
        load_runner(llama[0], num_blocks=1 << 40)


def test_failed_allocation_is_one_line(llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory\nframe #0")

    monkeypatch.setattr(registry, "allocate", allocate)
    with pytest.raises(OutOfMemory, match=r"cpu: .*not enough memory$"):
        load_runner(llama[0])


def test_close_releases_in_order_and_only_once(llama: tuple[Path, Any]) -> None:
    runner = load_runner(llama[0])
    assert list(runner.close()) == ["steps", "graphs", "kv_cache", "weights", "process_group", "device_cache"]
    assert runner.close() == {}
    assert ModelRunner().close() == {}
    with pytest.raises(RuntimeError, match="no model is loaded"):
        runner.submit(Step(0, []))


def test_weights_are_freed_at_once(llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Native models have no reference cycles, so that releasing them needs no garbage collection."""
    runner = load_runner(llama[0])
    generate(runner, [3, 4], 2)
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    runner.close()
    assert collected == []


def test_two_runners_in_one_process(llama: tuple[Path, Any], tmp_path: Path) -> None:
    other = save_tiny(tmp_path, "qwen2")
    first, second, prompt = load_runner(llama[0]), load_runner(tmp_path), random_tokens(5, seed=9)
    assert generate(first, prompt, 5) == reference_greedy(llama[1], prompt, 5)
    assert generate(second, prompt, 5) == reference_greedy(other, prompt, 5)


def test_foreign_architecture(tmp_path: Path) -> None:
    """Models that are not native run through transformers' code, on the same pool and steps."""
    torch.manual_seed(0)
    shape = SHAPE | {"intermediate_size": 128, "initializer_range": 0.2}
    reference = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape)).eval()
    reference.save_pretrained(tmp_path)
    prompt, seen = random_tokens(11, seed=2), list[Progress]()
    runner = ModelRunner()
    info = runner.load(Start(config(tmp_path), RankSpec(), str(tmp_path)), seen.append)
    assert (info.architecture, info.vocab_size, info.context_len) == ("GPTNeoXForCausalLM", VOCAB, 256)
    assert seen[0].budget == config(tmp_path).start_timeout
    assert generate(runner, prompt, 12, chunk=4) == reference_greedy(reference, prompt, 12)
    runner.close()


def test_bfloat16_and_dummy_weights(llama: tuple[Path, Any]) -> None:
    path, reference = llama
    runner, prompt = load_runner(path, dtype="bfloat16"), random_tokens(9, seed=8)
    logits = reference_logits(reference, prompt)[-1]
    token = generate(runner, prompt, 1)[0]
    assert float(logits[token]) > float(logits.max()) - 1.0
    dummy = [generate(load_runner(path, load_format="dummy"), prompt, 4) for _ in range(2)]
    assert dummy[0] == dummy[1]


@pytest.mark.parametrize("name", ["llama", "fallback"])
def test_a_long_step_gives_signs_of_life_after_its_layers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ullm.model.kernels.cpu.ops.CALL_OPERATIONS", 1)  # else layers so small are one call
    save_tiny(tmp_path, "llama")
    if name == "fallback":  # as an architecture that is not ours
        monkeypatch.setattr("ullm.model.architectures.registry.NATIVE", {})
    signs: list[Progress] = []
    runner = ModelRunner()
    runner.load(Start(config(tmp_path, step_timeout=7.0), RankSpec(), str(tmp_path)), signs.append)
    new = [NewSequence(0, random_tokens(9, 1), 9, GREEDY, [0, 1, 2])]
    del signs[:]
    runner.submit(Step(1, [ScheduledSequence(0, 0, 8, sample=False)], new)).result()
    assert signs == []  # it was short
    monkeypatch.setattr("ullm.model.execution.runner.PROGRESS_SECONDS", 0.0)
    runner.submit(Step(2, [ScheduledSequence(0, 8, 1, sample=True)])).result()
    assert signs == [Progress("step", 7.0)] * SHAPE["num_hidden_layers"]
