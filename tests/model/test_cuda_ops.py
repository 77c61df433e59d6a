"""Fused layers: how they are wired, when they are trusted, and, where Triton is installed, its kernels by
its interpreter, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import FakeCuda
from model_fixtures import random_tokens, reference_greedy, save_tiny
from test_graphs import step_by_step
from torch import Tensor

from ullm.model.cuda.check import disagreements
from ullm.model.cuda.ops import FusedOps, choose_ops
from ullm.model.decoder import Decoder
from ullm.model.layers import RMSNorm
from ullm.model.ops import TorchOps
from ullm.model.rope import rope_cache

INTERPRETED = """
import itertools
import torch
from test_cuda_ops import attention, tables
from ullm.model.cuda import kernels
from ullm.model.cuda.check import disagreements
from ullm.model.cuda.ops import FusedOps
from ullm.model.ops import TorchOps

shapes = [(4, 2, 16, True), (3, 1, 24, True), (2, 2, 8, False), (16, 8, 128, True)]
for (heads, kv_heads, size, norm), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
    pair, module = tables(size, dtype), attention(heads, kv_heads, size, norm, dtype)
    found = disagreements(FusedOps(*pair, kernels), TorchOps(*pair), module, 80, 1100)
    assert not found, (heads, kv_heads, size, norm, dtype, found)
print("agreed")
"""


class PlainKernels:
    """What the Triton kernels compute, said another way."""

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if delta is not None:
            x += delta
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, -1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    def rotate_and_store(
        self, qkv: Tensor, pool: Tensor, slots: Tensor, positions: Tensor, tables: tuple[Tensor, Tensor],
        norms: tuple[Tensor, Tensor] | None, eps: float,
    ) -> Tensor:  # fmt: skip
        kv_heads, size = pool.shape[3:]
        heads = qkv.view(len(qkv), -1, size).float()
        q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
        if norms is not None:
            q, k = (F.rms_norm(x, (size,), w.float(), eps) for x, w in zip((q, k), norms, strict=True))
        cos, sin = (table[positions, 0, None].float() for table in tables)
        q, k = (x * cos + torch.cat((x[..., size // 2 :], x[..., : size // 2]), -1) * sin for x in (q, k))
        for target, new in zip(pool, (k, v), strict=True):
            target.view(-1, kv_heads, size)[slots] = new.to(pool.dtype)
        return q.to(qkv.dtype)


def tables(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Of a rotary embedding for 64 positions."""
    cos, sin = rope_cache({"rope_type": "default", "rope_theta": 10000.0}, size, 64)
    return cos.to(dtype), sin.to(dtype)


def attention(heads: int, kv_heads: int, size: int, norm: bool, dtype: torch.dtype = torch.float32) -> Any:
    """One layer's attention."""
    norms = [RMSNorm(size, 1e-6) if norm else None for _ in range(2)]
    torch.manual_seed(3)
    for each in norms:
        if each is not None:
            each.weight.data = torch.rand(size).to(dtype)
    return SimpleNamespace(
        layer=0, num_heads=heads, num_kv_heads=kv_heads, head_dim=size, scale=1.0, window=None,
        q_norm=norms[0], k_norm=norms[1],
    )  # fmt: skip


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "llama-bias", "mistral"])
def test_tokens_are_transformers(name: str, graphs: bool, tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, name)
    cuda = FakeCuda(tmp_path, graphs=False)
    model = cuda.rank.model
    assert isinstance(model, Decoder)
    assert isinstance(model.ops, TorchOps)
    model.ops = FusedOps(*model.ops.tables, PlainKernels())
    if graphs:
        cuda.capture()
    prompts = [random_tokens(length, seed=length) for length in (5, 1, 9)]
    found = step_by_step(cuda.runner, prompts, 12)
    assert found == [reference_greedy(reference, p, len(f)) for p, f in zip(prompts, found, strict=True)]
    assert bool(cuda.replays) == graphs


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_agrees(dtype: torch.dtype, norm: bool) -> None:
    pair = tables(16, dtype)
    fused, plain = FusedOps(*pair, PlainKernels()), TorchOps(*pair)
    assert disagreements(fused, plain, attention(4, 2, 16, norm, dtype), 64, 96) == []


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("add_norm", {"norm", "sum and norm"}),
        ("silu_and_mul", {"gate"}),
        ("rotate_and_store", {"attention"}),
    ],
)
def test_what_does_not_agree_is_named(name: str, where: set[str]) -> None:
    kernels: Any = PlainKernels()
    right = getattr(kernels, name)
    setattr(kernels, name, lambda *args: right(*args) * 1.1)
    found = disagreements(
        FusedOps(*tables(16), kernels), TorchOps(*tables(16)), attention(4, 2, 16, True), 64, 96
    )
    assert {line.partition(" of ")[0] for line in found} == where


def test_nan_does_not_agree() -> None:
    kernels: Any = PlainKernels()
    kernels.silu_and_mul = lambda gate_up: gate_up[:, ::2] * torch.nan
    found = disagreements(
        FusedOps(*tables(16), kernels), TorchOps(*tables(16)), attention(4, 2, 16, True), 64, 96
    )
    assert found == ["gate of 1 rows by nan", "gate of 5 rows by nan"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="there is Triton")
def test_without_triton_layers_are_pytorch_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert type(choose_ops(*tables(16), attention(4, 2, 16, True), 64, 96)) is TorchOps
    (record,) = caplog.records
    assert "without fused kernels" in record.getMessage()


@pytest.mark.parametrize(("factor", "kind"), [(1.0, FusedOps), (1.1, TorchOps)])
def test_only_kernels_that_agree_are_used(
    factor: float,
    kind: type[TorchOps],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kernels: Any = PlainKernels()
    right = kernels.silu_and_mul
    kernels.silu_and_mul = lambda gate_up: right(gate_up) * factor
    monkeypatch.setattr("ullm.model.cuda.ops.import_module", lambda _: kernels)
    assert type(choose_ops(*tables(16), attention(4, 2, 16, True), 64, 96)) is kind
    assert bool(caplog.records) == (kind is TorchOps)


@pytest.mark.process
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with CUDA")
def test_triton_kernels_by_its_interpreter() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout == "agreed\n", done.stderr
