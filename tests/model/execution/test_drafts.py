"""Drafts in the real runner: the same texts in fewer steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.model.model_fixtures import GREEDY, SHAPE, config, generate, load_runner, random_tokens, save_tiny
from ullm.model.execution.runner import ModelRunner
from ullm.protocol.messages import NewSequence, ScheduledSequence, Step, StepResult
from ullm.sampling import SamplingParams
from ullm.scheduling.block_pool import BlockPool
from ullm.scheduling.scheduler import Scheduler
from ullm.scheduling.sequence import Sequence
from ullm.scheduling.statistics import SchedulerStatistics

BLOCK, EOS = 4, SHAPE["eos_token_id"]
ROOMY, TIGHT = 600, 40
PHRASE = random_tokens(9, seed=5)
PROMPTS = [PHRASE * 3, PHRASE[:2] * 6, random_tokens(30, seed=1), [PHRASE[0]] * 4, PHRASE[:3]]
VARIETY: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.6, "top_p": 0.9, "logit_bias": {5: 15.0, 6: 15.0, 8: 15.0}},
    {"temperature": 0, "logit_bias": {5: 15.0, 6: 15.0, 2: 20.0}, "min_tokens": 40},
    {"temperature": 0.7, "top_k": 3, "logit_bias": {5: 9.0}},
    {"temperature": 0, "repetition_penalty": 1.2, "logprobs": 1},
]
"""Few tokens by bias make a random model repeat itself. The last request gets no drafts, and shares its
steps with those that do."""


def requests(count: int = 60) -> list[tuple[list[int], SamplingParams]]:
    return [
        (prompt, SamplingParams(seed=seed, max_tokens=count, **options))
        for seed, (prompt, options) in enumerate(zip(PROMPTS, VARIETY, strict=True))
    ]


def run(
    runner: ModelRunner,
    path: Path,
    asked: list[tuple[list[int], SamplingParams]],
    speculate: int,
    **options: Any,
) -> tuple[list[list[int]], SchedulerStatistics, int]:
    """Return the texts, the scheduler's statistics, and the number of steps."""
    scheduler, pool = open_scheduler(path, speculate, **options)
    found: list[list[int]] = [[] for _ in asked]
    for seq_id, (prompt, params) in enumerate(asked):
        total = len(prompt) + (params.max_tokens or 0)
        scheduler.add(Sequence(seq_id, list(prompt), len(prompt), params, total, (0, seq_id)))
    steps = 0
    while (step := scheduler.schedule()) is not None:
        for event in scheduler.apply(runner.submit(step).result()):
            found[event.seq_id] += event.token_ids
            if event.logprobs is not None:
                assert [entry.token_id for entry in event.logprobs] == event.token_ids
        steps += 1
        pool.check_integrity()
    runner.submit(Step(0, [], released=list(range(len(asked)))))
    return found, scheduler.statistics(), steps


def open_scheduler(path: Path, speculate: int, **options: Any) -> tuple[Scheduler, BlockPool]:
    settings = config(path, speculate=speculate, **options)
    pool = BlockPool(settings.num_blocks or 1)
    return Scheduler(settings, pool, BLOCK, [EOS], prefix_cache=settings.prefix_cache), pool


@pytest.fixture(params=["float32", "bfloat16", "without kernels"])
def runner(request: pytest.FixtureRequest, llama: tuple[Path, Any]) -> ModelRunner:
    dtype = "bfloat16" if request.param == "bfloat16" else "float32"
    kernels = request.param != "without kernels"
    return load_runner(llama[0], num_blocks=ROOMY, dtype=dtype, cpu_kernels=kernels)


def test_the_same_texts_alone_and_in_a_batch(runner: ModelRunner, llama: tuple[Path, Any]) -> None:
    path, asked = llama[0], requests()
    expected = [run(runner, path, [one], 0, num_blocks=ROOMY)[0][0] for one in asked]
    accepted = []
    for one, text in zip(asked, expected, strict=True):
        (found,), statistics, steps = run(runner, path, [one], 6, num_blocks=ROOMY)
        assert found == text
        assert len(text) - statistics.accepted_tokens <= steps <= len(text)
        accepted.append(statistics.accepted_tokens)
    assert min(accepted[1:4]) > 5, "greedy and seeded"
    assert accepted[4] == 0
    together, statistics, _ = run(runner, path, asked, 6, num_blocks=ROOMY)
    assert together == expected
    assert statistics.accepted_tokens > 0


@pytest.mark.parametrize("budget", [8, 64])
def test_the_same_texts_under_pressure(llama: tuple[Path, Any], budget: int) -> None:
    path, asked = llama[0], requests()
    expected = run(load_runner(path, num_blocks=ROOMY), path, asked, 0, num_blocks=ROOMY)[0]
    options: dict[str, Any] = {"num_blocks": TIGHT, "max_num_batched_tokens": budget}
    found, statistics, _ = run(load_runner(path, **options), path, asked, 5, **options)
    assert found == expected
    assert statistics.accepted_tokens > 0
    assert statistics.preemptions > 0


@pytest.mark.parametrize("name", ["mistral", "qwen2-windows", "qwen3"])
def test_other_models(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, name)
    runner = load_runner(tmp_path, num_blocks=ROOMY)
    expected = run(runner, tmp_path, requests(), 0, num_blocks=ROOMY)[0]
    found, statistics, _ = run(runner, tmp_path, requests(), 6, num_blocks=ROOMY)
    assert found == expected
    assert statistics.accepted_tokens > 0


# --- by hand -------------------------------------------------------------------------------------------

PROMPT = random_tokens(10, seed=3)
BLOCKS = list(range(12))


def begin(runner: ModelRunner, params: SamplingParams = GREEDY) -> StepResult:
    new = [NewSequence(0, PROMPT, len(PROMPT), params, BLOCKS)]
    return runner.submit(Step(0, [ScheduledSequence(0, 0, 10, True)], new, released=[0])).result()


def drafted(runner: ModelRunner, start: int, draft: list[int]) -> list[int]:
    row = ScheduledSequence(0, start, 1 + len(draft), True, [], draft)
    (sampled,) = runner.submit(Step(1, [row])).result().sampled
    return sampled.token_ids


def test_right_guesses_are_returned_with_one_token_more(llama: tuple[Path, Any]) -> None:
    runner = load_runner(llama[0])
    text = generate(runner, PROMPT, 12)
    for right in range(5):
        begin(runner)
        guess = text[1:5]
        if right < 4:
            guess[right] = (guess[right] + 1) % 50 + 3
        assert drafted(runner, 10, guess) == text[1 : right + 2]
        rest = drafted(runner, 11 + right, text[right + 2 : right + 4])
        assert rest == text[right + 2 : right + 5], "KV of wrong guesses is written over"


@pytest.mark.parametrize(
    ("row", "params", "message"),
    [
        (ScheduledSequence(0, 10, 3, True, [], [5]), GREEDY, "it has 11"),
        (ScheduledSequence(0, 9, 3, True, [], [5]), GREEDY, "a draft of 1 among 3 tokens"),
        (ScheduledSequence(0, 10, 2, False, [], [5]), GREEDY, "a draft of 1 among 2 tokens"),
        (ScheduledSequence(0, 10, 1, True, [], [5]), GREEDY, "1 tokens from 10 are scheduled"),
        (ScheduledSequence(0, 9, 2, True, [], [5]), GREEDY, "sampling after token 10 of 11"),
        (ScheduledSequence(0, 10, 40, True, [], [5] * 39), GREEDY, "50 tokens do not fit"),
        (
            ScheduledSequence(0, 10, 2, True, [], [5]),
            replace(GREEDY, logprobs=0),
            "penalties or log probabilities",
        ),
        (
            ScheduledSequence(0, 10, 2, True, [], [5]),
            replace(GREEDY, presence_penalty=1),
            "penalties or log probabilities",
        ),
    ],
)
def test_a_draft_that_cannot_be_verified_is_refused(
    llama: tuple[Path, Any], row: ScheduledSequence, params: SamplingParams, message: str
) -> None:
    runner = load_runner(llama[0])
    begin(runner, params)
    with pytest.raises(ValueError, match=message):
        runner.submit(Step(1, [row]))
