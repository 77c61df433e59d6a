"""LoRA adapters through the real runner: each sequence gets what transformers says of its merged model."""

from __future__ import annotations

import json
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.model.lora_fixtures import ALL, adapter, matrices, merged, write_adapter
from tests.model.model_fixtures import (
    SHAPE,
    LogitsModel,
    config,
    load_runner,
    random_tokens,
    reference_greedy,
    reference_logits,
    save_tiny,
)
from ullm.model.execution.runner import ModelRunner
from ullm.model.loading import adapters
from ullm.protocol.messages import Adapter, NewSequence, ScheduledSequence, Step
from ullm.sampling import SamplingParams
from ullm.scheduling.block_pool import BlockPool
from ullm.scheduling.scheduler import Scheduler
from ullm.scheduling.sequence import Sequence

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def serve(
    runner: ModelRunner, path: Path, requests: list[tuple[list[int], Adapter | None]], **options: Any
) -> list[list[int]]:
    """Greedy tokens of requests that run together, one step ahead, sharing prefixes where they may."""
    settings = config(path, **options)
    scheduler = Scheduler(settings, BlockPool(settings.num_blocks or 1), 4, [2])
    found: list[list[int]] = [[] for _ in requests]
    for seq_id, (prompt, own) in enumerate(requests):
        total = len(prompt) + 12
        scheduler.add(Sequence(seq_id, list(prompt), len(prompt), GREEDY, total, (0, seq_id), adapter=own))
    pending: deque[Any] = deque()
    for _ in range(1000):
        step = scheduler.schedule()
        if step is not None:
            pending.append(runner.submit(step))
        elif not pending:
            return found
        if len(pending) == 2 or step is None:
            for event in scheduler.apply(pending.popleft().result()):
                found[event.seq_id] += event.token_ids
    raise AssertionError("the requests do not end")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("lora-base")
    return path, save_tiny(path, "llama")


@pytest.fixture(scope="module")
def two(model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Adapter, Any]]:
    """Two adapters of different ranks and layers, and transformers' models with each of them merged."""
    folder, (_, base) = tmp_path_factory.mktemp("adapters"), model
    first, second = matrices(base, ALL, 4, seed=1), matrices(base, ("q_proj", "down_proj"), 20, seed=2)
    write_adapter(folder / "first", first)
    write_adapter(folder / "second", second, r=20, lora_alpha=10, use_rslora=True)
    return [
        (adapter(folder / "first", 1), merged(base, first, 2.0)),
        (adapter(folder / "second", 2), merged(base, second, 10 / 20**0.5)),
    ]


@pytest.mark.parametrize("kernels", [True, False])
def test_several_adapters_in_one_batch(
    model: tuple[Path, Any], two: list[tuple[Adapter, Any]], kernels: bool
) -> None:
    path, base = model
    common = random_tokens(13, seed=7)  # of three blocks, which only sequences of one adapter share
    models: list[tuple[Adapter | None, Any]] = [(None, base), *two]
    prompts = [common, random_tokens(5, 1), [*common, 9]]
    requests = [(prompt, own) for prompt in prompts for own, _ in models]
    options: dict[str, Any] = {"num_blocks": 40, "max_num_batched_tokens": 16, "cpu_kernels": kernels}
    found = serve(load_runner(path, **options), path, requests, **options)
    expected = [reference_greedy(reference, prompt, 12) for prompt in prompts for _, reference in models]
    assert found == expected
    assert len({tuple(tokens) for tokens in expected[:3]}) == 3, "the adapters change nothing"


def logits(path: Path, own: Adapter | None, tokens: list[int], **options: Any) -> torch.Tensor:
    from ullm.model.execution.adapters import AdapterTable

    loaded = LogitsModel(path, **options)
    table = AdapterTable(loaded.model, torch.device("cpu"))
    loaded.table.add(NewSequence(0, tokens, len(tokens), GREEDY, list(range(16)), adapter=own))
    if own is not None:
        assert not (error := table.use(own)), error
    plan = loaded.table.plan(Step(0, [ScheduledSequence(0, 0, len(tokens), False)]))
    batch = loaded.backend.prepare(plan.layout)
    batch.adapters = table.rows(plan)
    with torch.inference_mode():
        return loaded.model.logits(loaded.model.forward(batch.token_ids, batch))


@pytest.mark.parametrize("kernels", [True, False])
def test_logits_equal_those_of_the_merged_model(
    model: tuple[Path, Any], two: list[tuple[Adapter, Any]], kernels: bool
) -> None:
    tokens = random_tokens(40, seed=3)
    for own, reference in two:
        found = logits(model[0], own, tokens, cpu_kernels=kernels)
        torch.testing.assert_close(found, reference_logits(reference, tokens), rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_adapters_beside_it(
    model: tuple[Path, Any], two: list[tuple[Adapter, Any]]
) -> None:
    """Bit by bit, with the CPU kernels, whose products do not either; the plain one beside others, too."""
    path, _ = model
    prompts = [random_tokens(count, count) for count in (3, 9, 14)]
    requests = [(prompts[i], own) for i, own in enumerate([None, two[0][0], two[1][0]])]
    together = scores(path, requests)
    for request, both in zip(requests, together, strict=True):
        assert torch.equal(scores(path, [request])[0], both)


def scores(path: Path, requests: list[tuple[list[int], Adapter | None]]) -> list[torch.Tensor]:
    """The last logits of prompts computed in one step."""
    from ullm.model.execution.adapters import AdapterTable

    loaded = LogitsModel(path)
    table = AdapterTable(loaded.model, torch.device("cpu"))
    rows = []
    for i, (prompt, own) in enumerate(requests):
        blocks = list(range(8 * i, 8 * i + 8))
        loaded.table.add(NewSequence(i, prompt, len(prompt), GREEDY, blocks, adapter=own))
        rows.append(ScheduledSequence(i, 0, len(prompt), False))
        if own is not None:
            assert not (error := table.use(own)), error
    plan = loaded.table.plan(Step(0, rows))
    batch = loaded.backend.prepare(plan.layout)
    batch.adapters = table.rows(plan)
    with torch.inference_mode():
        out = loaded.model.logits(loaded.model.forward(batch.token_ids, batch))
    pairs = zip(plan.sequences, plan.ends, strict=True)
    last = {row.seq_id: out[end - 1] for (row, _), end in pairs}
    return [last[i] for i in range(len(requests))]


@pytest.mark.parametrize("level", [1, 2])
def test_adapters_are_there_after_a_sleep(
    model: tuple[Path, Any], two: list[tuple[Adapter, Any]], level: int
) -> None:
    path, _ = model
    runner, (own, reference) = load_runner(path), two[0]
    prompt = random_tokens(6, seed=4)
    expected = reference_greedy(reference, prompt, 12)
    assert serve(runner, path, [(prompt, own)]) == [expected]
    runner.sleep(level)
    runner.wake(lambda _: None)
    assert serve(runner, path, [(prompt, own)]) == [expected]


def test_a_lost_adapter_fails_its_own_sequences_only(
    model: tuple[Path, Any], two: list[tuple[Adapter, Any]], tmp_path: Path
) -> None:
    path, base = model
    folder = write_adapter(tmp_path / "gone", matrices(base, ALL, 4, seed=5))
    gone = adapter(folder, 9)
    shutil.rmtree(folder)
    runner, prompt = load_runner(path), random_tokens(6, seed=4)
    new = [
        NewSequence(0, prompt, 6, GREEDY, [0, 1, 2], adapter=gone),
        NewSequence(1, prompt, 6, GREEDY, [3, 4, 5], adapter=two[0][0]),
    ]
    rows = [ScheduledSequence(seq_id, 0, 6, True) for seq_id in (0, 1)]
    lost, fine = runner.submit(Step(1, rows, new)).result().sampled
    assert lost.lacks_adapter
    assert "gone" in lost.error
    assert "cannot be read" in lost.error
    assert fine.token_ids == reference_greedy(two[0][1], prompt, 1)
    assert not fine.error


def test_files_that_have_changed_are_not_taken_for_those_that_were_loaded(
    model: tuple[Path, Any], tmp_path: Path
) -> None:
    path, base = model
    folder = write_adapter(tmp_path / "one", matrices(base, ALL, 4, seed=5))
    before = adapter(folder)
    write_adapter(folder, matrices(base, ALL, 4, seed=6))
    assert "have changed" in load_runner(path).keep_adapter(before, wanted=True)


def test_an_unloaded_adapter_leaves_with_its_last_sequence(
    model: tuple[Path, Any], two: list[tuple[Adapter, Any]]
) -> None:
    path, _ = model
    runner, (own, reference), prompt = load_runner(path), two[0], random_tokens(6, seed=4)
    expected = reference_greedy(reference, prompt, 3)
    step = Step(
        1, [ScheduledSequence(0, 0, 6, True)], [NewSequence(0, prompt, 6, GREEDY, [0, 1, 2], adapter=own)]
    )
    found = runner.submit(step).result().sampled[0].token_ids
    assert runner.keep_adapter(own, wanted=False) == ""
    for number in (2, 3):
        step = Step(number, [ScheduledSequence(0, 4 + number, 1, True)])
        found = found + runner.submit(step).result().sampled[0].token_ids
    assert found == expected
    layer = runner._rank.model.lora().places["model.layers.0.self_attn.q_proj"].layer  # type: ignore[union-attr]
    assert own.number in layer.deltas
    runner.submit(Step(4, [], released=[0])).result()
    assert own.number not in layer.deltas


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_float_adapters_on_a_quantized_base(
    model: tuple[Path, Any], two: list[tuple[Adapter, Any]], scheme: str
) -> None:
    """What the adapter adds is what it adds to a model whose weights are those of the quantized one."""
    from ullm.model.layers.quantization import quantize

    path, base = model
    tokens = random_tokens(20, seed=3)
    own, reference = two[0]
    delta = merged(base, {}, 0.0)
    with torch.no_grad():
        for name, module in delta.named_modules():
            if isinstance(module, torch.nn.Linear):
                bits = 4 if scheme == "int4" and name != "lm_head" else 8
                extra = reference.get_submodule(name).weight - module.weight
                module.weight.copy_(quantize(module.weight, bits).dequantize() + extra)
    found = logits(path, own, tokens, quantization=scheme)
    expected = reference_logits(delta, tokens)
    # The kernels round the inputs of quantized products to eight bits as well.
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_models_through_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    windows = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
    shape = SHAPE | windows | {"head_dim": 16, "num_hidden_layers": 4}
    base = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**shape)).float().eval()
    base.save_pretrained(tmp_path / "base")
    tensors = matrices(base, ALL, 4, seed=1)
    own = adapter(write_adapter(tmp_path / "own", tensors))
    prompts = [random_tokens(9, 1), random_tokens(4, 2)]
    runner = load_runner(tmp_path / "base")
    found = serve(runner, tmp_path / "base", [(prompts[0], own), (prompts[1], None), (prompts[1], own)])
    reference = merged(base, tensors)
    assert found[0] == reference_greedy(reference, prompts[0], 12)
    assert found[1] == reference_greedy(base, prompts[1], 12)
    assert found[2] == reference_greedy(reference, prompts[1], 12)


def test_patterns_of_ranks_and_alphas(model: tuple[Path, Any], tmp_path: Path) -> None:
    path, base = model
    wide, usual = matrices(base, ("q_proj",), 8, seed=1), matrices(base, ("up_proj",), 4, seed=2)
    patterns = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"model.layers.\d+.self_attn.q_proj": 4}}
    own = adapter(write_adapter(tmp_path / "own", wide | usual, **patterns))
    reference = merged(merged(base, wide, 4 / 8), usual, 8 / 4)
    tokens = random_tokens(20, seed=3)
    torch.testing.assert_close(
        logits(path, own, tokens), reference_logits(reference, tokens), rtol=1e-4, atol=1e-4
    )


KEY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "tensors", "words"),
    [
        ({"use_dora": True}, {}, "use_dora True"),
        ({"bias": "all"}, {}, "bias 'all'"),
        ({"lora_bias": True}, {}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, {}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, {}, "changes the base model"),
        ({"fan_in_fan_out": True}, {}, "fan_in_fan_out"),
        ({"something_of_2030": 1}, {}, "something_of_2030"),
        ({"peft_type": "IA3"}, {}, "only LORA"),
        ({"r": "four"}, {}, "'r' must be a number"),
        ({"r": 8}, {}, "rank 4"),
        ({"rank_pattern": {"(": 4}}, {}, "rank_pattern"),
        ({}, {f"{KEY}.lora_magnitude_vector": (64,)}, "DoRA"),
        ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 120)}, "embedding"),
        ({}, {"base_model.model.lm_head.weight": (120, 64)}, "whole tensor"),
        ({}, {"base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": (4, 64)}, "no lora_B"),
        ({}, {f"{KEY}.lora_A.weight": (4, 32)}, "(64, 32)"),
        ({}, {f"{KEY}.lora_A.weight": (5, 64)}, "have the shapes"),
        ({}, {f"{KEY.replace('q_proj', 'router')}.lora_A.weight": (4, 64),
              f"{KEY.replace('q_proj', 'router')}.lora_B.weight": (4, 4)}, "no linear layer"),
        ({}, {"base_model.model.lm_head.lora_A.weight": (4, 64),
              "base_model.model.lm_head.lora_B.weight": (120, 4)}, "lm_head"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_by_name(
    model: tuple[Path, Any], tmp_path: Path, change: dict[str, Any], tensors: dict[str, Any], words: str
) -> None:
    path, base = model
    extra = {name: torch.ones(shape) for name, shape in tensors.items()}
    folder = write_adapter(tmp_path / "odd", matrices(base, ("q_proj",), 4, seed=1) | extra, **change)
    runner = load_runner(path)
    error = runner.keep_adapter(adapter(folder), wanted=True)
    assert words in error
    assert "\n" not in error
    assert not runner._rank.model.lora().places[KEY.removeprefix("base_model.model.")].layer.deltas  # type: ignore[union-attr]


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_takes_for_ever_is_refused(
    model: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(adapters, "MATCH_SECONDS", 0.05)
    patterns = {key: {"(?:.|..|...)+(?=[A-Z])": 4}}
    folder = write_adapter(tmp_path / "slow", matrices(model[1], ("q_proj",), 4, seed=1), **patterns)
    error = load_runner(model[0]).keep_adapter(adapter(folder), wanted=True)
    assert "takes too long to match" in error
    assert "adapter_config.json" in error


def test_alternatives_of_a_pattern_are_matched_as_a_whole(model: tuple[Path, Any], tmp_path: Path) -> None:
    """As by peft, also where the pattern says that it begins with the name."""
    tensors = matrices(model[1], ("q_proj", "k_proj"), 4, seed=1)
    patterns = {"alpha_pattern": {"^model.layers.0|nothing": 64}}
    own = adapter(write_adapter(tmp_path / "own", tensors, **patterns))
    tokens = random_tokens(20, seed=3)
    expected = reference_logits(merged(model[1], tensors), tokens)
    torch.testing.assert_close(logits(model[0], own, tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_truncated_file_is_refused(model: tuple[Path, Any], tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "cut", matrices(model[1], ALL, 4, seed=1))
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[:-100])
    assert "not a complete" in load_runner(model[0]).keep_adapter(adapter(folder), wanted=True)
    (folder / "adapter_config.json").write_text(json.dumps([]))
    assert "adapter_config.json" in load_runner(model[0]).keep_adapter(adapter(folder), wanted=True)
