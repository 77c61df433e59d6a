"""Models that run through transformers' code, split over ranks by its plans: equal to one rank."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.architectures.split_rank import LENGTH
from tests.model.layers.test_parallel import ROOT, free_ports, run_ranks
from tests.model.model_fixtures import (
    LogitsModel,
    config,
    random_tokens,
    reference_greedy,
    reference_logits,
    save_tiny,
)
from tests.model.tiny_architectures import TOLERANCE, save_tiny_model
from ullm.errors import ModelUnsupported
from ullm.model.architectures.transformers_loading import empty_model
from ullm.model.architectures.transformers_ranks import TRIED, check_plan
from ullm.model.execution.chosen import digest
from ullm.model.layers.parallel import ParallelContext
from ullm.model.loading.checkpoint import read_checkpoint

SAMPLE = ("cohere2", "deepseek_v3", "exaone4", "gemma4_text", "gpt_neox", "gpt_oss", "granitemoe", "llama")
"""Plans of many kinds: with and without experts, fused projections, latent attention, sinks."""
WAIT = 900


def split_logits(root: Path, kinds: list[str], ranks: int = 2) -> list[dict[str, torch.Tensor | str]]:
    """Return each rank's logits."""
    meet = f"127.0.0.1:{free_ports(1)[0]}"
    files = [root / f"rank{rank}.pt" for rank in range(ranks)]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank, file in enumerate(files):
            command = [sys.executable, "-m", "tests.model.architectures.split_rank"]
            arguments = [str(root), str(rank), str(ranks), meet, str(file), *kinds]
            processes.append(
                stack.enter_context(
                    subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, cwd=ROOT)
                )
            )
            stack.callback(processes[-1].kill)
        for process in processes:
            _, stderr = process.communicate(timeout=WAIT)
            assert process.returncode == 0, stderr.decode()
    return [torch.load(file) for file in files]


def check(kinds: list[str], root: Path) -> None:
    tokens = random_tokens(LENGTH, seed=1)
    expected = {kind: reference_logits(save_tiny_model(kind, root / kind), tokens) for kind in kinds}
    for rank in split_logits(root, kinds):
        for kind, logits in rank.items():
            assert isinstance(logits, torch.Tensor), logits
            assert float((logits - expected[kind]).abs().max()) <= TOLERANCE, kind


@pytest.mark.process
def test_ranks_agree_with_one_and_sleep_and_wake(tmp_path: Path) -> None:
    reference = save_tiny_model("starcoder2", tmp_path / "model")
    tokens = random_tokens(20, seed=1)
    found = run_ranks(tmp_path / "model", tmp_path, 2)
    greedy = reference_greedy(reference, tokens, 8)
    digests = [digest(number, [token]) for number, token in zip([0, *range(7)], greedy, strict=True)]
    for index, rank in enumerate(found):
        torch.testing.assert_close(rank["logits"], reference_logits(reference, tokens), atol=1e-4, rtol=0)
        assert rank["generated"] == [greedy if index == 0 else digests] * 4
        assert "process_group" in rank["closed"]


@pytest.mark.slow
@pytest.mark.process
def test_olmo_s_norms_over_all_heads_are_left_to_transformers(tmp_path: Path) -> None:
    reference, tokens = save_tiny(tmp_path / "model", "olmo2"), random_tokens(20, seed=1)
    for rank in run_ranks(tmp_path / "model", tmp_path, 2):
        torch.testing.assert_close(rank["logits"], reference_logits(reference, tokens), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.process
def test_a_sample_of_plans(tmp_path: Path) -> None:
    check(list(SAMPLE), tmp_path)


@pytest.mark.long
@pytest.mark.process
@pytest.mark.timeout(1200)
def test_every_plan_that_is_used(tmp_path: Path) -> None:
    check(sorted(TRIED), tmp_path)


@pytest.mark.parametrize(
    ("kind", "ranks", "message"),
    [
        ("gpt2", 2, r"no plan to split GPT2LMHeadModel over ranks; use --tp-size 1"),
        ("youtu", 2, r"not known to give the same results; use --tp-size 1"),
        ("starcoder2", 3, r"num_attention_heads 4 does not divide by --tp-size 3"),
        ("starcoder2", 4, r"num_key_value_heads 2 does not divide by --tp-size 4"),
    ],
)
def test_refused(kind: str, ranks: int, message: str, tmp_path: Path) -> None:
    save_tiny_model(kind, tmp_path)
    with pytest.raises(ModelUnsupported, match=message):
        LogitsModel(tmp_path, ParallelContext(0, ranks))


def test_stages_are_refused(tmp_path: Path) -> None:
    save_tiny_model("starcoder2", tmp_path)
    with pytest.raises(ModelUnsupported, match=r"has no stages; use --pp-size 1"):
        LogitsModel(tmp_path, ParallelContext(0, 1, 0, 2))


def test_random_weights_are_refused(tmp_path: Path) -> None:
    save_tiny_model("starcoder2", tmp_path)
    with pytest.raises(
        ModelUnsupported, match="random weights of Starcoder2ForCausalLM run on one rank only"
    ):
        LogitsModel(tmp_path, ParallelContext(0, 2), load_format="dummy")


def test_on_gpus_nothing_is_captured(tmp_path: Path) -> None:
    save_tiny_model("starcoder2", tmp_path)
    given, cpu, cuda = config(tmp_path), torch.device("cpu"), torch.device("cuda")
    checkpoint = read_checkpoint(tmp_path, given, cpu)
    empty = empty_model(checkpoint, given)
    with pytest.raises(ModelUnsupported, match="several GPUs with --enforce-eager"):
        check_plan(empty, checkpoint, given, cuda, 2)
    check_plan(empty, checkpoint, dataclasses.replace(given, enforce_eager=True), cuda, 2)


def test_without_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model("starcoder2", tmp_path)
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "accelerate" else find(name, *rest)
    )
    with pytest.raises(ModelUnsupported, match=r"pip install 'ullm-engine\[accelerate\]'"):
        LogitsModel(tmp_path, ParallelContext(0, 2))
