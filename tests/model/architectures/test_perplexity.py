"""The real model on a text: how much quality quantization costs.

alice.txt is the first chapter of Lewis Carroll's "Alice's Adventures in Wonderland" (1865), which is in the
public domain everywhere. `test_quantized_models` has the same promise for tiny models.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from tests.model.model_fixtures import LogitsModel
from ullm.config import ModelConfig
from ullm.hub import resolve
from ullm.model.kernels.cpu import build

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler"),
]

WINDOW = 256
"""Tokens that are predicted from each other."""
SAMPLE = 512
"""Tokens of the text that are predicted: only a part of it, since CPUs without AVX-512 are slow."""
WORST = {"int8": 1.01, "int4": 1.015}
"""Most perplexity, as a multiple of bfloat16's. Measured: 0.997 and 1.006 for the sample, 1.006 and 1.002 for
the whole text in windows of 512 tokens. The released weights had four bits once, so four bits cost little."""


def perplexity(path: Path, quantization: str, count: int) -> float:
    """Perplexity of the first ``count`` tokens of the text."""
    text = (Path(__file__).parent / "alice.txt").read_text(encoding="utf-8")
    tokens = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids[: count + 1]
    model = LogitsModel(path, dtype="bfloat16", quantization=quantization, block_size=16)
    total = 0.0
    for start in range(0, len(tokens) - 1, WINDOW):
        window = tokens[start : start + WINDOW + 1]
        model.add(start, window[:-1], list(range(WINDOW // 16)))
        logits = model.step((start, 0, len(window) - 1))[start].float()
        total += F.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum").item()
    return math.exp(total / (len(tokens) - 1))


def test_quantization_costs_little_perplexity() -> None:
    path = resolve(ModelConfig()).path
    base = perplexity(path, "none", SAMPLE)
    assert 15 < base < 30
    ratios = {quantization: perplexity(path, quantization, SAMPLE) / base for quantization in WORST}
    assert all(ratio < WORST[quantization] for quantization, ratio in ratios.items()), ratios
