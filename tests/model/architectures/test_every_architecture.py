"""Every causal language model of transformers: equal to it, or refused with a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.model.outcomes import known_outcomes
from tests.model.tiny_architectures import TOLERANCE, causal_models, try_out

CHOSEN = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen2_moe", "qwen3_moe"),
    *("phi3", "granite", "olmo2", "olmo3", "smollm3", "gpt_oss", "deepseek_v3", "gemma4_text", "glm4_moe"),
    *("ernie4_5", "exaone4", "cohere2", "starcoder2", "gpt_neox", "gpt2", "opt", "hunyuan_v1_dense"),
    *("falcon", "mamba2", "bloom", "qwen3_5_text", "lfm2"),
)
"""Those of `EVERY` that the fast tier tries, the last few of which are refused."""
EVERY = known_outcomes()
NUMBER = re.compile(r"\d+")
"""Of an index, which may be another each time."""


def check(kind: str, folder: Path) -> None:
    """The same verdict as in the table, a small error, and a reason that is one sentence with a name."""
    known = EVERY[kind]
    outcome = try_out(kind, known.name, folder)
    assert outcome.verdict == known.verdict
    assert NUMBER.sub("N", outcome.reason) == NUMBER.sub("N", known.reason)
    assert outcome.error <= TOLERANCE
    assert outcome.verdict != "refused" or (known.name in outcome.reason or len(outcome.reason.split()) > 4)


@pytest.mark.parametrize("kind", CHOSEN)
def test_a_chosen_architecture(kind: str, tmp_path: Path) -> None:
    check(kind, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(EVERY.keys() - set(CHOSEN)))
def test_every_other_architecture(kind: str, tmp_path: Path) -> None:
    check(kind, tmp_path)


@pytest.mark.long
def test_the_table_has_every_architecture() -> None:
    assert {kind: known.name for kind, known in EVERY.items()} == causal_models()
