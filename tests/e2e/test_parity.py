"""The real model, greedy, in float32: token for token what transformers generates.

Transformers' `generate` takes, at each position, the most likely token given all before it. One forward
pass over a prompt and our whole answer shows what it would have taken at each position: if that is our
token everywhere, then its answer is ours, by induction. For some prompts `generate` itself is run too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ullm.config import EngineConfig
from ullm.llm import LLM, SamplingParams

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class ParityCase:
    """Which prompts are continued by how many tokens, and by which code on a CPU.

    Args:
        is_small: eight prompts of up to 130 tokens instead of all 56.
        blocks: of a KV cache too small for all of them.
    """

    is_small: bool
    new_tokens: int
    cpu_kernels: bool
    blocks: int

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.new_tokens, ignore_eos=True)


SAMPLES = [
    pytest.param(ParityCase(True, 16, cpu_kernels=False, blocks=16), id="torch"),
    pytest.param(ParityCase(True, 32, cpu_kernels=True, blocks=16), id="kernels", marks=pytest.mark.slow),
    pytest.param(
        ParityCase(False, 64, cpu_kernels=True, blocks=128),
        id="all",
        marks=[pytest.mark.long, pytest.mark.timeout(3600)],
    ),
]
"""C++ kernels take minutes for long prompts on CPUs without AVX-512."""

CLOSE = 1e-4
"""Logits nearer than this are a tie, which the order of float32 sums may decide either way. Where the CPU's
kernels were measured there was none: every token was the best."""

TEXTS = [
    "The supervisor starts its children in order and stops them in the reverse order.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "Once upon a time, in a village by the sea, there lived an old clockmaker who",
    "Die Hauptstadt von Frankreich ist Paris, und die von Deutschland ist",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Question: Why does ice float on water?\nAnswer:",
    "東京は日本の首都です。",
    "SELECT name, age FROM people WHERE",
    "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer",
    "😀 Emoji and “quotes” – and a list:\n- one\n- two\n-",
]


@pytest.fixture(scope="module")
def reference(real_model: Path) -> Iterator[Any]:
    # One thread: with more, OpenMP waits for cores that other processes have.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=SAMPLES)
def sample(request: pytest.FixtureRequest) -> ParityCase:
    """How much is compared; see the tiers of tests."""
    found: ParityCase = request.param
    return found


@pytest.fixture(scope="module")
def prompts(real_model: Path, sample: ParityCase) -> list[list[int]]:
    """Prompts of 1 to 1,500 tokens; some share long beginnings."""
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    draw = random.Random(1)
    short = [tokenizer.encode(text) for text in TEXTS]
    flat = [token for text in short for token in text]
    story = [flat[draw.randrange(len(flat))] for _ in range(64)]
    mixed: list[int] = []
    while len(mixed) < 1600:
        mixed += short[draw.randrange(len(short))] + story[: draw.randrange(20)]
    if sample.is_small:
        shared = [mixed[:64] + text for text in short[1:3]]
        return [short[0], short[4], short[6], mixed[:1], *shared, mixed[:64], mixed[:129]]
    lengths = [1, 2, 3, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200, 255, 257, 300, 400]
    lengths += [511, 512, 513, 700, 900, 1100, 1300, 1499, 1500]
    cut = [mixed[draw.randrange(100) :][:length] for length in lengths]
    shared = [mixed[:640] + text for text in short[:8]] + [mixed[: 160 * (i + 1)] for i in range(8)]
    return [*short, *cut, *shared]


def check(reference: Any, prompt: list[int], output: list[int]) -> None:
    """Every token is the one that transformers would have taken."""
    ids = torch.tensor([prompt + output])
    with torch.inference_mode():
        logits = reference(ids, logits_to_keep=len(output) + 1).logits[0, :-1]
    best = logits.max(-1).values
    behind = best - logits[torch.arange(len(output)), torch.tensor(output)]
    assert behind.max() <= CLOSE, f"prompt of {len(prompt)}: token {int(behind.argmax())} is not the best"


def outputs_of(
    model: Path, prompts: list[list[int]], sample: ParityCase, **options: Any
) -> tuple[list[list[int]], Any]:
    options |= {"standby_workers": 0, "cpu_kernels": sample.cpu_kernels}
    if sample.is_small:  # several steps, or none would find what another has computed
        options["max_num_batched_tokens"] = 128
    config = EngineConfig(model=str(model), dtype="float32", **options)
    with LLM(config) as llm:
        answers = llm.generate_sync(prompts, sample.params)
        engine = llm._host._engine
        assert engine is not None
        return [choices[0].token_ids for choices in answers], engine.statistics()


@pytest.fixture(scope="module")
def plentiful(real_model: Path, prompts: list[list[int]], sample: ParityCase) -> tuple[list[list[int]], Any]:
    """Continue all prompts at once, with room for all."""
    return outputs_of(real_model, prompts, sample, max_bs=64)


def test_all_prompts_at_once_give_what_transformers_gives(
    reference: Any, prompts: list[list[int]], plentiful: tuple[list[list[int]], Any], sample: ParityCase
) -> None:
    outputs, statistics = plentiful
    assert len(prompts) >= (8 if sample.is_small else 50)
    assert {len(output) for output in outputs} == {sample.new_tokens}
    assert statistics.prefix_cache_hit_tokens > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        check(reference, prompt, output)


@pytest.mark.slow
def test_a_pool_too_small_for_all_changes_nothing(
    real_model: Path, prompts: list[list[int]], plentiful: tuple[list[list[int]], Any], sample: ParityCase
) -> None:
    outputs, statistics = outputs_of(real_model, prompts, sample, max_bs=16, num_blocks=sample.blocks)
    assert statistics.preemptions_total > 0
    assert outputs == plentiful[0]


@pytest.mark.slow
def test_generate_itself_says_the_same(
    reference: Any, prompts: list[list[int]], plentiful: tuple[list[list[int]], Any], sample: ParityCase
) -> None:
    for prompt, output in list(zip(prompts, plentiful[0], strict=True))[:: 4 if sample.is_small else 9]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            generated = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=sample.new_tokens,
                max_new_tokens=sample.new_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert generated[0, len(prompt) :].tolist() == output
