"""lm-eval through /v1/completions scores as transformers does, also where tokens are parts of characters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.clients import lm_eval_scores
from tests.clients.test_frameworks import environment
from tests.support.server import starting_servers
from ullm.config import ModelConfig
from ullm.hub import resolve

pytestmark = [pytest.mark.long, pytest.mark.process, pytest.mark.timeout(1800)]

PACKAGES = ("lm-eval[api]==0.4.13",)
TEXTS = (
    "The capital of France is Paris, and the capital of Japan is 東京。",
    "東京は日本の首都で、世界最大級の都市です。桜🌸が美しい季節には多くの人が訪れます。",
    "서울은 대한민국의 수도이다 🇰🇷. 사람이 많다 👨‍👩‍👧‍👦!",
    "😀😀😀😀😀😀😀😀 👍🏽👍🏽👍🏽 🎉🎉 – “quoted” façade naïve",
    "北京是中华人民共和国的首都。北京是中华人民共和国的首都。北京是",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
)
PAIRS = [(text[:cut], text[cut:]) for text in TEXTS for cut in (1, len(text) // 2, len(text) - 2)]
PAIRS += [("1, 2, 3, 4, 5, 6, 7,", " 8,"), ("The capital of France is", " Paris")]


def reference(folder: Path, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Return what lm-eval's own backend computes: the sum over a continuation, and whether it is greedy."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scores = []
    for context, continuation in pairs:
        with torch.inference_mode():
            logits = model(torch.tensor([[*context, *continuation][:-1]])).logits[0, -len(continuation) :]
        chosen = torch.tensor(continuation)
        found = logits.log_softmax(-1).gather(1, chosen[:, None]).sum()
        scores.append((float(found), bool((logits.argmax(-1) == chosen).all())))
    return scores


def test_loglikelihoods_are_those_of_transformers(tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", *PACKAGES)
    with starting_servers() as start:
        done = subprocess.run(
            [python, lm_eval_scores.__file__, f"{start('--dtype', 'float32').url}/v1"],
            input=json.dumps(PAIRS),
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    # A continuation may have no token of its own, where the context ends within its first one.
    found = [each for each in json.loads(done.stdout.splitlines()[-1]) if each[1]]
    assert len(found) > 15
    wanted = reference(
        resolve(ModelConfig()).path, [(context, continuation) for context, continuation, _, _ in found]
    )
    worst = 0.0
    for (_, continuation, score, greedy), (true_score, truly) in zip(found, wanted, strict=True):
        worst = max(worst, abs(score - true_score) / len(continuation))
        assert greedy == truly
    sys.stdout.write(f"{len(found)} pairs, at most {worst:.1e} a token apart\n")
    assert worst < 1e-4
    assert {greedy for _, _, _, greedy in found} == {True, False}
