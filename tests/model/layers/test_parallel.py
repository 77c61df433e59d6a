"""Tensor parallelism: real ranks over gloo compute what one rank computes."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.model_fixtures import (
    LogitsModel,
    random_tokens,
    reference_greedy,
    reference_logits,
    save_tiny,
)
from ullm.errors import ModelUnsupported
from ullm.model.architectures.decoder import split_heads
from ullm.model.architectures.llama import LlamaForCausalLM
from ullm.model.execution.chosen import digest
from ullm.model.layers.parallel import ParallelContext
from ullm.model.layers.split import HeadShare

WAIT = 120
ROOT = Path(__file__).parents[3]
"""The folder that `tests` is imported from."""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def run_ranks(folder: Path, out: Path, world_size: int, stages: int = 1) -> list[dict[str, Any]]:
    """Each rank opens two process groups, one after the other; each needs a port of its own."""
    files = [out / f"rank{rank}.pt" for rank in range(world_size)]
    meet = [f"127.0.0.1:{port}" for port in free_ports(2)]
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank, file in enumerate(files):
            command = [
                sys.executable,
                "-m",
                "tests.model.layers.tp_rank",
                folder,
                str(rank),
                str(world_size),
                str(stages),
                *meet,
                file,
            ]
            ranks.append(stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT)))
            stack.callback(ranks[-1].kill)
        for process in ranks:
            _, stderr = process.communicate(timeout=WAIT)
            assert process.returncode == 0, stderr.decode()
    return [torch.load(file) for file in files]


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("llama-bias", 2),
        pytest.param("llama-bias", 3, marks=pytest.mark.slow),
        pytest.param("qwen3", 4, marks=pytest.mark.slow),
        pytest.param("gemma3", 2, marks=pytest.mark.slow),
        pytest.param("phi3", 2, marks=pytest.mark.slow),
        pytest.param("qwen2-moe", 2, marks=pytest.mark.slow),
    ],
)
def test_ranks_agree_with_one(name: str, world_size: int, tmp_path: Path) -> None:
    """Qwen3's two KV heads over four ranks are held twice; 120 tokens divide, 122 would be padded."""
    reference = save_tiny(tmp_path / "model", name)
    tokens = random_tokens(20, seed=1)
    found = run_ranks(tmp_path / "model", tmp_path, world_size)
    greedy = reference_greedy(reference, tokens, 8)
    numbers = [0, *range(7)]  # of the steps
    digests = [digest(number, [token]) for number, token in zip(numbers, greedy, strict=True)]
    for index, rank in enumerate(found):
        torch.testing.assert_close(rank["logits"], reference_logits(reference, tokens), atol=1e-4, rtol=0)
        assert rank["generated"] == [greedy if index == 0 else digests] * 4
        assert rank["closed"][4] == "process_group"


@pytest.mark.parametrize(("kv_heads", "firsts"), [(4, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (1, [0, 0, 0, 0])])
def test_more_ranks_than_kv_heads_share_them(kv_heads: int, firsts: list[int], tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    hf = json.loads((tmp_path / "config.json").read_text()) | {"num_key_value_heads": kv_heads}
    shape = LlamaForCausalLM.read_config(hf, 64)
    assert [split_heads(shape, ParallelContext(rank, 4)) for rank in range(4)] == [
        HeadShare((rank,), (first,)) for rank, first in enumerate(firsts)
    ]


@pytest.mark.parametrize("rank", range(3))
def test_vocabulary_that_does_not_divide(rank: int) -> None:
    from ullm.model.layers.linear import VocabParallelHead

    head = VocabParallelHead(10, 4, ParallelContext(rank, 3))
    (shard,) = (shard for _, shard in head.shards("lm_head"))
    count = (4, 4, 2)[rank]
    assert (shard.runs, len(shard.target), head.rows) == (((rank * 4, count),), count, 4)


def test_more_ranks_than_heads(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    with pytest.raises(ModelUnsupported, match="4 attention heads cannot be split over --tp-size 5"):
        LogitsModel(tmp_path, ParallelContext(0, 5))


def test_more_stages_than_layers(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    with pytest.raises(ModelUnsupported, match="3 layers cannot be split over --pp-size 4"):
        LogitsModel(tmp_path, ParallelContext(0, 1, 0, 4))


@pytest.mark.parametrize("stage", range(2))
def test_a_stage_reads_its_tensors_and_complains_of_no_other_stage_s(
    stage: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path, "llama")
    place = ParallelContext(0, 1, stage, 2)
    model = LogitsModel(tmp_path, place).model
    names = {name for name, _ in model.named_parameters()} if isinstance(model, LlamaForCausalLM) else set()
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    assert layers == ({"0", "1"} if stage == 0 else {"2"})
    assert "not used" not in caplog.text
    assert isinstance(model, LlamaForCausalLM)
    assert model.is_elsewhere("model.embed_tokens.weight") == (stage == 1)
    assert model.is_elsewhere("lm_head.weight") == (stage == 0)
    assert not model.is_elsewhere("model.layers.7.mlp.up_proj.weight"), "no stage has such a layer"
