"""The real scheduler drives the real runner, one step ahead: what comes out is what transformers says.

A small pool forces preemption, common prefixes are reused, prompts are chunked among decodes, and
workers are lost half way. None of it may show in a token.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.model.model_fixtures import (
    SHAPE,
    config,
    load_runner,
    random_tokens,
    reference_greedy,
    reference_logits,
    save_tiny,
)
from ullm.model.execution.runner import ModelRunner
from ullm.protocol.messages import Step, TokenLogprobs
from ullm.sampling import SamplingParams
from ullm.scheduling.block_pool import BlockPool
from ullm.scheduling.scheduler import Scheduler
from ullm.scheduling.sequence import Sequence
from ullm.scheduling.sequence_blocks import most_blocks
from ullm.scheduling.statistics import SchedulerStatistics

BLOCK, EOS = 4, SHAPE["eos_token_id"]
ROOMY, TIGHT = 400, 26
"""Blocks: for all sequences at once, or for about two of them."""


@dataclass
class SampledRequest:
    """A request and its results so far."""

    prompt: list[int]
    params: SamplingParams
    found: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def sequence(self, seq_id: int) -> Sequence:
        """Return the sequence as a router gives it to a scheduler: resumed after the emitted tokens."""
        assert self.params.max_tokens is not None
        return Sequence(
            seq_id=seq_id,
            token_ids=self.prompt + self.found,
            num_prompt_tokens=len(self.prompt),
            params=self.params,
            max_total=len(self.prompt) + self.params.max_tokens,
            queue_key=(0, seq_id),
        )


def run(
    runner: ModelRunner, path: Path, requests: list[SampledRequest], steps: int = 10_000, **options: Any
) -> SchedulerStatistics:
    """Serve the unfinished requests for at most ``steps`` steps."""
    settings = config(path, **options)
    pool = BlockPool(settings.num_blocks or 1)
    window = runner._loaded()[0].info.window
    scheduler = Scheduler(settings, pool, BLOCK, [EOS], prefix_cache=settings.prefix_cache, window=window)
    for seq_id, request in enumerate(requests):
        if request.finish_reason is None:
            scheduler.add(request.sequence(seq_id))
    pending: deque[Any] = deque()
    for _ in range(steps):
        step = scheduler.schedule()
        if step is not None:
            pending.append(runner.submit(step))
        elif not pending:
            break
        if len(pending) == 2 or step is None:
            for event in scheduler.apply(pending.popleft().result()):
                request = requests[event.seq_id]
                assert event.index == len(request.found)
                request.found += event.token_ids
                request.logprobs += event.logprobs or []
                request.finish_reason = event.finish_reason
        pool.check_integrity()
    return scheduler.statistics()


def prompts() -> list[list[int]]:
    """Return prompts of 1 to 50 tokens; some share prefixes of whole blocks and of parts of blocks."""
    common = random_tokens(22, seed=99)
    alone = [random_tokens(count, seed) for seed, count in enumerate((1, 3, 4, 5, 17, 50))]
    return alone + [common + random_tokens(count, 50 + count) for count in (1, 2, 9, 20)] + [common[:16]]


def foreign(folder: Path, family: str, **options: Any) -> Any:
    """Save a random model that runs through transformers' code, and return it."""
    torch.manual_seed(0)
    model_config = getattr(transformers, f"{family}Config")(**(SHAPE | options))
    model = getattr(transformers, f"{family}ForCausalLM")(model_config).float().eval()
    model.save_pretrained(folder)
    return model


def build(name: str, folder: Path) -> Any:
    match name:
        case "gpt-neox":
            return foreign(folder, "GPTNeoX")
        case "gemma2":
            windows = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
            return foreign(folder, "Gemma2", **windows, head_dim=16, num_hidden_layers=4)
        case _:
            return save_tiny(folder, name)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen2-windows",
        "gemma2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "qwen3", "gpt-neox")),
    ],
)
def test_greedy_under_pressure_equals_transformers(name: str, tmp_path: Path) -> None:
    reference = build(name, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=24)
    requests = [SampledRequest(prompt, params) for prompt in prompts()]
    options: dict[str, Any] = {"num_blocks": TIGHT, "max_num_batched_tokens": 16}
    statistics = run(load_runner(tmp_path, **options), tmp_path, requests, **options)
    # Where all layers have a window, a sequence gives back what is behind it, and all of them fit.
    assert statistics.preemptions > 0 or name == "mistral"
    assert statistics.prefix_hits > 0
    for request in requests:
        expected = reference_greedy(reference, request.prompt, 24)
        if EOS in expected:
            expected = expected[: expected.index(EOS) + 1]
        assert request.found == expected
        assert request.finish_reason == ("stop" if expected[-1] == EOS else "length")


@pytest.mark.parametrize(("name", "cpu_kernels"), [("mistral", True), ("mixtral", False)])
def test_texts_of_any_length_in_the_blocks_of_a_window(name: str, cpu_kernels: bool, tmp_path: Path) -> None:
    """All layers see a window, so a pool of 40 tokens holds a text of 250, and two others beside it."""
    reference = build(name, tmp_path)
    options: dict[str, Any] = {"max_num_batched_tokens": 16, "max_bs": 8, "cpu_kernels": cpu_kernels}
    options["num_blocks"] = most_blocks(8, 16, BLOCK) + 3
    runner = load_runner(tmp_path, **options)
    assert runner._loaded()[0].info.context_len == 256
    lengths = {230: 20, 90: 30, 9: 40}
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in lengths.values()]
    texts = [random_tokens(length, seed=length) for length in lengths]
    requests = [SampledRequest(*each) for each in zip(texts, params, strict=True)]
    assert run(runner, tmp_path, requests, **options).steps < 80  # they take turns, or share steps
    for request, count in zip(requests, lengths.values(), strict=True):
        assert request.found == reference_greedy(reference, request.prompt, count)


def test_a_pool_that_holds_no_window_limits_the_context(tmp_path: Path) -> None:
    build("mistral", tmp_path)
    for num_blocks, context_len in ((7, 256), (6, 24)):
        runner = load_runner(tmp_path, num_blocks=num_blocks, max_num_batched_tokens=16)
        assert runner._loaded()[0].info.context_len == context_len


VARIETY: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20, "min_p": 0.02},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0.9, "presence_penalty": 0.8, "frequency_penalty": 0.3, "logprobs": 2},
    {"temperature": 0.8, "logit_bias": {5: 3.0, 9: -100.0}, "min_tokens": 15, "logprobs": 0},
]


def sampled_requests() -> list[SampledRequest]:
    """One for each prompt, no two alike in what they ask."""
    return [
        SampledRequest(prompt, SamplingParams(seed=seed, max_tokens=20, **VARIETY[seed % len(VARIETY)]))
        for seed, prompt in enumerate(prompts())
    ]


@pytest.fixture(scope="module")
def undisturbed(llama: tuple[Path, Any]) -> list[SampledRequest]:
    """Each request alone, with all the room there is."""
    runner = load_runner(llama[0], num_blocks=ROOMY)
    requests = sampled_requests()
    for request in requests:
        run(runner, llama[0], [request], num_blocks=ROOMY, prefix_cache=False)
        runner.submit(forget_all(1))
    return requests


def forget_all(count: int) -> Step:
    """A step that clears a runner for another scheduler."""
    return Step(0, [], released=list(range(count)))


def same(found: list[SampledRequest], expected: list[SampledRequest]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.found == theirs.found
        assert ours.finish_reason == theirs.finish_reason
        assert [entry.token_id for entry in ours.logprobs] == [entry.token_id for entry in theirs.logprobs]
        for entry, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("num_blocks", [ROOMY, TIGHT])
@pytest.mark.parametrize("max_bs", [3, 8])
def test_seeded_samples_do_not_depend_on_the_batch(
    llama: tuple[Path, Any], undisturbed: list[SampledRequest], num_blocks: int, max_bs: int
) -> None:
    options: dict[str, Any] = {
        "num_blocks": num_blocks,
        "max_bs": max_bs,
        "max_num_batched_tokens": 12,
    }
    requests = sampled_requests()
    run(load_runner(llama[0], **options), llama[0], requests, **options)
    same(requests, undisturbed)


@pytest.mark.parametrize("steps", [3, 9, 20])
def test_requests_of_a_lost_worker_go_on_as_if_nothing_had_happened(
    llama: tuple[Path, Any], undisturbed: list[SampledRequest], steps: int
) -> None:
    """Runner and scheduler vanish in the middle, again and again; each time all starts from the tokens."""
    requests = sampled_requests()
    lives = 0
    while any(request.finish_reason is None for request in requests):
        run(load_runner(llama[0], num_blocks=ROOMY), llama[0], requests, steps, num_blocks=ROOMY)
        lives += 1
    assert lives > 1
    same(requests, undisturbed)


def test_prompt_logprobs_of_a_chunked_prompt(llama: tuple[Path, Any]) -> None:
    """Beside others, and for a prompt of which a prefix is cached: it is computed all the same."""
    path, reference = llama
    prompt = prompts()[9]
    plain = SamplingParams(temperature=0, max_tokens=4)
    asking = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1)
    runner, collected = load_runner(path, num_blocks=ROOMY), []
    settings = config(path, num_blocks=ROOMY, max_num_batched_tokens=12)
    scheduler = Scheduler(settings, BlockPool(ROOMY), BLOCK, [EOS])
    for seq_id, params in enumerate((plain, asking)):
        scheduler.add(SampledRequest(prompt, params).sequence(seq_id))
    while (step := scheduler.schedule()) is not None:
        for event in scheduler.apply(runner.submit(step).result()):
            if event.seq_id == 1:
                collected += event.prompt_logprobs or []
    expected = torch.log_softmax(reference_logits(reference, prompt), -1)
    assert [entry.token_id for entry in collected] == prompt[1:]
    found = [entry.logprob for entry in collected]
    assert found == pytest.approx([float(expected[i, token]) for i, token in enumerate(prompt[1:])], abs=1e-4)
