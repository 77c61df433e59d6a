"""The real Gemma-3-270M, from its GGUF file, writes what transformers writes with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.model.model_fixtures import generate, load_runner
from tests.model.real_gemma import real_gemma
from ullm.model.loading.convert import write_gguf

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1800)]

PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Die drei größten Städte Österreichs sind")
COUNT = 16
LONG = 900
"""Tokens of a prompt that is longer than the sliding window of 512."""


@pytest.fixture(scope="module")
def gemma() -> Path:
    return real_gemma()


@pytest.fixture(scope="module")
def tokenizer(gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_gguf(gemma, folder, "tokenizer")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference(gemma: Path) -> Any:
    """As transformers reads the file, without the accelerate package that its ``from_pretrained`` needs."""
    config = transformers.AutoConfig.from_pretrained(gemma.parent, gguf_file=gemma.name)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(str(gemma), return_tensors=True, model_to_load=empty)["tensors"]
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    story = (Path(__file__).parent / "alice.txt").read_text(encoding="utf-8")
    return [*(tokenizer.encode(text).ids for text in PROMPTS), tokenizer.encode(story).ids[:LONG]]


def test_tokens_are_those_of_transformers(gemma: Path, tokenizer: Tokenizer) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(gemma.parent, gguf_file=gemma.name)
    for text in (*PROMPTS, "  two  spaces\n\n\n\tand a tab", "\U0001f642 \u4f60\u597d <start_of_turn>user\n"):
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"], text


def test_greedy_text_is_that_of_transformers(gemma: Path, reference: Any, prompts: list[list[int]]) -> None:
    runner = load_runner(gemma, quantization="none", num_blocks=300, context_len=2048)
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected = reference.generate(ids, do_sample=False, max_new_tokens=COUNT, eos_token_id=None)
        found = generate(runner, prompt, COUNT, chunk=512, seq_id=number)
        assert found == expected[0, len(prompt) :].tolist()


def test_it_answers_as_it_is(gemma: Path, tokenizer: Tokenizer, prompts: list[list[int]]) -> None:
    """With its quantized weights, which the kernels compute in eight and four bits."""
    runner = load_runner(gemma, dtype="auto", num_blocks=300, context_len=2048)
    answer = tokenizer.decode(generate(runner, tokenizer.encode("Paris is the capital city of").ids, COUNT))
    assert "France" in answer
    story = tokenizer.decode(generate(runner, prompts[3], COUNT, chunk=512, seq_id=1))
    assert len(set(story.split())) > COUNT // 4
