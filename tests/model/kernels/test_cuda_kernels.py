"""Fused layers: how they are wired, when they are trusted, and, where Triton is installed, its kernels by
its interpreter, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.fake_cuda import Calls, FakeCuda
from tests.model.kernel_checks import PlainDecode, attention, tables
from tests.model.model_fixtures import random_tokens, reference_greedy, save_tiny, step_by_step
from ullm.model.architectures.decoder import Decoder
from ullm.model.attention.varlen import VarlenAttention
from ullm.model.kernels.cuda.check import disagreements
from ullm.model.kernels.cuda.decode_choice import DecodeChoice, SplitDecode, choose_decode
from ullm.model.kernels.cuda.ops import FusedOps, choose_ops
from ullm.model.layers.layer_ops import TorchOps
from ullm.model.memory.kv_pool import KvShape
from ullm.model.sampling.choose import choose_tokens

INTERPRETED = """
import itertools
import torch
from tests.model.kernel_checks import attention, check_choice, check_decode, tables
from ullm.model.kernels.cuda import check, choose, decode, kernels
from ullm.model.kernels.cuda.check import disagreements
from ullm.model.kernels.cuda.ops import FusedOps
from ullm.model.layers.layer_ops import TorchOps

choose.CHUNK, check.VOCAB, check.CHOICES = 128, 300, 1  # the interpreter is slow
dtypes = torch.float32, torch.bfloat16
shapes = [(4, 2, 16, True), (3, 1, 24, True), (2, 2, 8, False), (16, 8, 128, True)]
for (heads, kv_heads, size, norm), dtype in zip(shapes, dtypes * 2):
    pair, module = tables(size, dtype), attention(heads, kv_heads, size, norm, dtype)
    found = disagreements(FusedOps(pair, kernels, choose.choose_tokens), TorchOps(pair), module, 80, 1100)
    assert not found, (heads, kv_heads, size, norm, dtype, found)
for shape in ((2, 2, 16, 32), (1, 3, 24, 16), (2, 1, 8, 16), (1, 5, 80, 32)):
    for dtype in (torch.float32, torch.float16):  # the interpreter does not multiply bfloat16
        for window, splits in itertools.product((0, 20), (1, 3)):
            check_decode(decode, decode.Tiling(16, 4, 2), *shape, dtype, window, splits)
for dtype in dtypes:
    check_choice(choose.choose_tokens, dtype)
print("agreed")
"""


class PlainKernels:
    """The computations of the Triton kernels, in PyTorch."""

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


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "llama-bias", "mistral"])
def test_tokens_are_transformers(name: str, graphs: bool, tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, name)
    cuda = FakeCuda(tmp_path, graphs=False)
    model = cuda.rank.model
    assert isinstance(model, Decoder)
    assert isinstance(model.ops, TorchOps)
    model.ops = FusedOps(model.ops.tables, PlainKernels(), choose_tokens)
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
    fused, plain = FusedOps(pair, PlainKernels(), choose_tokens), TorchOps(pair)
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
        FusedOps(tables(16), kernels, choose_tokens),
        TorchOps(tables(16)),
        attention(4, 2, 16, True),
        64,
        96,
    )
    assert {line.partition(" of ")[0] for line in found} == where


def test_other_tokens_do_not_agree() -> None:
    def other(logits: Tensor, *args: Any) -> Tensor:
        return (choose_tokens(logits, *args) + 1) % logits.shape[1]

    fused = FusedOps(tables(16), PlainKernels(), other)
    found = disagreements(fused, TorchOps(tables(16)), attention(4, 2, 16, True), 64, 96)
    assert set(found) == {"tokens in torch.float32"}


def test_nan_does_not_agree() -> None:
    kernels: Any = PlainKernels()
    kernels.silu_and_mul = lambda gate_up: gate_up[:, ::2] * torch.nan
    found = disagreements(
        FusedOps(tables(16), kernels, choose_tokens),
        TorchOps(tables(16)),
        attention(4, 2, 16, True),
        64,
        96,
    )
    assert found == ["gate of 1 rows by nan", "gate of 5 rows by nan"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="what is done without Triton")
def test_without_triton_layers_are_pytorch_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert type(choose_ops(tables(16), attention(4, 2, 16, True), 64, 96)) is TorchOps
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
    kernels.choose_tokens = choose_tokens
    monkeypatch.setattr("ullm.model.kernels.cuda.ops.import_module", lambda _: kernels)
    assert type(choose_ops(tables(16), attention(4, 2, 16, True), 64, 96)) is kind
    assert bool(caplog.records) == (kind is TorchOps)


# --- attention for decodes ---------------------------------------------------------------------------------


def backend_of(kv_heads: int = 2) -> VarlenAttention:
    """A pool of its own."""
    shape = KvShape(num_layers=1, num_kv_heads=kv_heads, head_dim=16, num_query_heads=4)
    backend = VarlenAttention(shape, 6, 8, torch.float32, torch.device("cpu"))
    backend.kernel = Calls()
    return backend


def timed(*seconds: float) -> Callable[[Callable[[], Tensor]], float]:
    """Says these, one after the other."""
    left = iter(seconds)

    def measure(work: Callable[[], Tensor]) -> float:
        work()
        return next(left)

    return measure


@pytest.mark.parametrize(
    ("seconds", "few", "many"),
    [
        ((1.0, 0.5, 0.4, 1.0, 2.0, 2.0), 128, None),
        ((1.0, 0.5, 0.49, 1.0, 0.9, 0.5), 64, 128),  # the second is not worth a change
        ((1.0, 0.96, 2.0, 1.0, 0.97, 0.96), None, None),
    ],
)
def test_the_fastest_attention_is_taken(
    seconds: tuple[float, ...],
    few: int | None,
    many: int | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("ullm.model.kernels.cuda.decode_choice.import_module", lambda _: PlainDecode())
    backend, ticks = backend_of(), []
    with caplog.at_level("INFO"):
        choice = choose_decode(backend, 40, 10, lambda: ticks.append(1), timed(*seconds))
    found = [getattr(choice(count) if choice else None, "tiling", None) for count in (1, 9, 10, 40)]
    assert [each and each.keys for each in found] == [few, few, many, many]
    assert len(ticks) == 4
    assert ["attention for decodes" in record.getMessage() for record in caplog.records] == [True, True]


@pytest.mark.parametrize("wrong", [1.1, torch.nan])
def test_attention_that_is_wrong_is_not_taken(
    wrong: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels: Any = PlainDecode()
    right = kernels.decode_attention
    kernels.decode_attention = lambda *args, **options: right(*args, **options) * wrong
    monkeypatch.setattr("ullm.model.kernels.cuda.decode_choice.import_module", lambda _: kernels)
    assert choose_decode(backend_of(), 40, 10, lambda: None, timed(1.0, 1.0)) is None
    assert "disagrees" in caplog.records[0].getMessage()


def test_attention_that_cannot_be_compiled_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels: Any = PlainDecode()
    monkeypatch.setattr(kernels, "decode_attention", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("ullm.model.kernels.cuda.decode_choice.import_module", lambda _: kernels)
    assert choose_decode(backend_of(), 40, 10, lambda: None, timed(1.0, 1.0)) is None
    assert "Flash Attention" in caplog.records[0].getMessage()


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_tokens_are_transformers_with_another_attention(name: str, tmp_path: Path) -> None:
    reference, kernels = save_tiny(tmp_path, name), PlainDecode()
    cuda = FakeCuda(tmp_path, graphs=False)
    assert isinstance(cuda.rank.backend, VarlenAttention)
    other = SplitDecode(kernels, kernels.TILINGS[0], 10)
    cuda.rank.backend.choose_decode = DecodeChoice(other, None, 3)
    cuda.capture()
    prompts = [random_tokens(length, seed=length) for length in (5, 1, 9)]
    found = step_by_step(cuda.runner, prompts, 12)
    assert found == [reference_greedy(reference, p, len(f)) for p, f in zip(prompts, found, strict=True)]
    assert kernels.splits
    assert {call[0] for call in cuda.kernel.calls if call[1] == 1} == {4}  # three, padded


@pytest.mark.process
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with CUDA")
def test_triton_kernels_by_its_interpreter() -> None:
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environ = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout == "agreed\n", done.stderr
