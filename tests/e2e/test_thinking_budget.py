"""A budget of thinking on a tiny model: the end comes when it must, also after the loss of a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers

from ullm.config import EngineConfig
from ullm.errors import InvalidParameter
from ullm.llm import LLM, SamplingParams
from ullm.testing import write_tiny_model

pytestmark = pytest.mark.process

BUDGET, TOKENS = 7, 30
OPTIONS: dict[str, Any] = {"dtype": "float32", "cpu_kernels": False, "standby_workers": 0, "context_len": 256}


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tokens to think between, which its random weights hardly ever choose."""
    folder = write_tiny_model(tmp_path_factory.mktemp("thinking"), vocab_size=1024)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def answers(model: Path, begin: int, end: int, **options: Any) -> list[list[int]]:
    """Return answers that begin to think by themselves, or in the prompt; each forced to its tokens."""
    config = EngineConfig(model=str(model), **{**OPTIONS, **options})
    prompts = [[5, 6, begin], [7, 8], [9, 10, begin], [5, 6, begin]]
    params = [_with(n) for n in (BUDGET, BUDGET, 0, None)]
    with LLM(config) as llm:
        return [choice.token_ids for (choice,) in llm.generate_sync(prompts, params)]


def _with(budget: int | None) -> SamplingParams:
    return SamplingParams(
        temperature=1, seed=3, max_tokens=TOKENS, ignore_eos=True, thinking_token_budget=budget
    )


def test_the_end_is_forced_also_after_the_loss_of_a_worker(thinking_model: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(thinking_model / "tokenizer.json"))
    begin, end = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")
    found = answers(thinking_model, begin, end, transport="thread")
    assert [each.index(end) if end in each else None for each in found] == [BUDGET, None, 0, None]
    assert found[0][:BUDGET] == found[3][:BUDGET], "the same until then"
    lossy = "worker.step:crash@nth=4,times=1"  # within the thinking
    assert answers(thinking_model, begin, end, faults=lossy) == found


def test_a_model_without_such_tokens_refuses(tiny_model: Path) -> None:
    with LLM(EngineConfig(model=str(tiny_model), transport="thread", **OPTIONS)) as llm:
        with pytest.raises(InvalidParameter, match="has no token </think>"):
            llm.generate_sync([[5, 6]], _with(3))
