"""Engines of several ranks: the tokens of one rank, whatever divides and whatever does not."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from tests.model.model_fixtures import LogitsModel
from tests.support.server import starting_servers
from tests.support.streams import Stream, texts
from ullm.config import EngineConfig
from ullm.grammars.structured_outputs import StructuredOutputs
from ullm.llm import LLM, SamplingParams
from ullm.testing import write_tiny_model

pytestmark = pytest.mark.process

PROMPTS = [[5, 6, 7], [300, 17, 301, 18, 302, 19, 303], list(range(40, 140)), [9]]
TOKENS = 24
GRIDS = [(2, 1), (3, 1), (1, 2), (2, 2)]
"""Ranks per stage, and stages."""
CLOSE = 1e-4
"""Logits nearer than this are a tie, which the order of float32 sums may decide either way."""

ODD = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "hidden_size": 144,
    "vocab_size": 515,
    "num_hidden_layers": 3,
    "intermediate_size": 176,
}
"""Heads, KV heads, hidden units, layers, and a vocabulary, none of which divides by two."""


log = logging.getLogger(__name__)


def write_odd_model(paths: pytest.TempPathFactory, architecture: str) -> Path:
    return write_tiny_model(paths.mktemp(architecture), architecture, **ODD)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def odd_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_odd_model(tmp_path_factory, request.param)


def greedy(model: Path, prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    """Return the greedy tokens that follow each prompt."""
    config = EngineConfig(model=str(model), dtype="float32", standby_workers=0, **options)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    with LLM(config) as llm:
        return [choices[0].token_ids for choices in llm.generate_sync(prompts, params)]


def assert_same(
    model: Path, prompts: list[list[int]], found: list[list[int]], alone: list[list[int]]
) -> None:
    """Compare token for token, up to the first tie, after which the answers may differ; log how many ties."""
    compared = ties = 0
    for prompt, ours, theirs in zip(prompts, found, alone, strict=True):
        pairs = enumerate(zip(ours, theirs, strict=True))
        parted = next((index for index, (one, other) in pairs if one != other), None)
        if parted is not None:
            margin = margin_after(model, prompt + theirs[:parted])
            assert margin <= CLOSE, f"token {parted} is {ours[parted]}, not {theirs[parted]}"
            log.warning("a tie within %.1e at token %d", margin, parted)
            ties += 1
        compared += len(ours) if parted is None else parted
    log.info("%d tokens are the same, %d answers of %d part at a tie", compared, ties, len(prompts))


def margin_after(model: Path, tokens: list[int]) -> float:
    """Return how far apart the two best logits are after these tokens."""
    alone = LogitsModel(model, num_blocks=len(tokens), cpu_kernels=False)
    alone.add(0, tokens, list(range(len(tokens))))
    best, second = alone.step((0, 0, len(tokens)))[0][-1].topk(2).values.tolist()
    return float(best - second)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(True, id="kernels", marks=pytest.mark.slow),
        pytest.param(False, id="torch", marks=pytest.mark.long),
    ],
)
def kernels(request: pytest.FixtureRequest) -> bool:
    """Whether the C++ kernels compute; without them, the slow tier has the real model's ranks."""
    chosen: bool = request.param
    return chosen


@pytest.fixture(scope="module")
def alone(odd_model: Path, kernels: bool) -> list[list[int]]:
    """The answers of one rank."""
    return greedy(odd_model, PROMPTS, TOKENS, cpu_kernels=kernels)


@pytest.mark.parametrize(("tp", "pp"), GRIDS)
def test_several_ranks_give_the_tokens_of_one(
    odd_model: Path, kernels: bool, alone: list[list[int]], tp: int, pp: int
) -> None:
    found = greedy(odd_model, PROMPTS, TOKENS, cpu_kernels=kernels, tp_size=tp, pp_size=pp)
    assert_same(odd_model, PROMPTS, found, alone)


REPETITIVE = [[300, 17, 301, 18] * 12, [5, 6, 7] * 10]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_drafts_are_verified_by_all_ranks(odd_model: Path, tp: int, pp: int) -> None:
    """Each rank counts the right guesses by itself, from the tokens that one of them has chosen."""
    plain = greedy(odd_model, REPETITIVE, TOKENS)
    found = greedy(odd_model, REPETITIVE, TOKENS, speculate=4, tp_size=tp, pp_size=pp)
    assert_same(odd_model, REPETITIVE, found, plain)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_stages_of_quantized_layers_give_the_tokens_of_one_rank(odd_model: Path, quantization: str) -> None:
    """With tensor parallelism, sums in another order may round an input to another code."""
    alone = greedy(odd_model, PROMPTS, TOKENS, quantization=quantization)
    assert greedy(odd_model, PROMPTS, TOKENS, quantization=quantization, pp_size=2) == alone


FORM = "(abc|xyz) [0-9]{5}"


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_grammars_hold_on_several_ranks(tiny_model: Path, tp: int, pp: int) -> None:
    """Only the rank that chooses tokens knows them."""
    config = EngineConfig(model=str(tiny_model), standby_workers=0, tp_size=tp, pp_size=pp)
    params = SamplingParams(temperature=0, max_tokens=30, structured_outputs=StructuredOutputs(regex=FORM))
    with LLM(config) as llm:
        for (answer,) in llm.generate_sync(PROMPTS[:2], params):
            assert re.fullmatch(FORM, answer.text)


REAL_PROMPTS = [
    [504, 3575, 282, 4649],
    [1, 4093, 198, 1780, 506, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198],
    [504 + 7 * index for index in range(150)],
    [28],
]


def over_http(model: Path, prompts: list[list[int]], tp: int, pp: int) -> list[list[int]]:
    """Return the greedy tokens that a server of so many ranks streams to clients that come at once."""
    flags = ("--dtype", "float32", "--no-cpu-kernels", "--standby-workers", "0")
    with starting_servers() as start:
        server = start("--model", str(model), *flags, "--tp-size", str(tp), "--pp-size", str(pp))
        running = [Stream(server, TOKENS, prompt, return_token_ids=True) for prompt in prompts]
        texts(running)
    return [stream.token_ids for stream in running]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("qwen3", marks=pytest.mark.long),
        pytest.param("real", marks=[pytest.mark.e2e, pytest.mark.slow]),
    ],
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A model, prompts for it, and what a server of one rank answers."""
    if request.param == "real":  # which has 9 query heads and 3 KV heads
        model, prompts = request.getfixturevalue("real_model"), REAL_PROMPTS
    else:
        model, prompts = write_odd_model(tmp_path_factory, request.param), PROMPTS
    return model, prompts, over_http(model, prompts, 1, 1)


@pytest.mark.parametrize(("tp", "pp"), GRIDS)
def test_servers_of_several_ranks_answer_as_one_of_one_rank(
    served: tuple[Path, list[list[int]], list[list[int]]], tp: int, pp: int
) -> None:
    model, prompts, alone = served
    assert_same(model, prompts, over_http(model, prompts, tp, pp), alone)
