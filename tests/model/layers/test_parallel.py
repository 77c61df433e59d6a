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
from ullm.model.layers.parallel import ParallelContext

WAIT = 120
ROOT = Path(__file__).parents[3]
"""The folder that `tests` is imported from."""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def run_ranks(folder: Path, out: Path, world_size: int) -> list[dict[str, Any]]:
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
    ("name", "world_size"), [("llama-bias", 2), pytest.param("qwen3", 4, marks=pytest.mark.slow)]
)
def test_ranks_agree_with_one(name: str, world_size: int, tmp_path: Path) -> None:
    """Qwen3's two KV heads over four ranks are held twice; 120 tokens divide, 122 would be padded."""
    reference = save_tiny(tmp_path / "model", name)
    tokens = random_tokens(20, seed=1)
    found = run_ranks(tmp_path / "model", tmp_path, world_size)
    for rank in found:
        torch.testing.assert_close(rank["logits"], reference_logits(reference, tokens), atol=1e-4, rtol=0)
        assert rank["generated"] == [reference_greedy(reference, tokens, 8)] * 4
        assert rank["closed"][4] == "process_group"


@pytest.mark.parametrize(("kv_heads", "firsts"), [(4, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (1, [0, 0, 0, 0])])
def test_more_ranks_than_kv_heads_share_them(kv_heads: int, firsts: list[int], tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    hf = json.loads((tmp_path / "config.json").read_text()) | {"num_key_value_heads": kv_heads}
    shape = LlamaForCausalLM.read_config(hf, 64)
    assert [split_heads(shape, ParallelContext(rank, 4)) for rank in range(4)] == [
        (1, 1, first) for first in firsts
    ]


@pytest.mark.parametrize("rank", range(3))
def test_vocabulary_that_does_not_divide(rank: int) -> None:
    from ullm.model.layers.linear import VocabParallelHead

    head = VocabParallelHead(10, 4, ParallelContext(rank, 3))
    (shard,) = (shard for _, shard in head.shards("lm_head"))
    assert (shard.start, len(shard.target), head.rows) == (rank * 4, (4, 4, 2)[rank], 4)


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    with pytest.raises(ModelUnsupported, match="4 attention heads cannot be split over --tp-size 3"):
        LogitsModel(tmp_path, ParallelContext(0, 3))
