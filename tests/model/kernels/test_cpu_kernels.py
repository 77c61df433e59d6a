"""The CPU's kernels against PyTorch, and their promise: a result depends on nothing but its own inputs."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.model_fixtures import MODELS, LogitsModel, config, outputs, random_tokens, save_tiny
from ullm.model.architectures.decoder import Decoder
from ullm.model.attention.batch import BatchLayout
from ullm.model.attention.gather import GatherAttention
from ullm.model.execution.runner import ModelRunner
from ullm.model.kernels.cpu import build
from ullm.model.kernels.cpu.kernels import NAMES, CpuKernels, load_kernels
from ullm.model.kernels.cpu.ops import KernelAttention, KernelOps, tiles
from ullm.model.layers.quantization import Bits, quantize
from ullm.model.sampling.choose import choose_tokens
from ullm.protocol.messages import RankSpec, Start

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")

BITS: tuple[Bits, ...] = (8, 4)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


INSTRUCTION_SETS = ["native", "x86-64-v3", pytest.param("x86-64-v2", marks=pytest.mark.slow)]
"""What kernels are compiled for: this machine, AVX2 without AVX-512, and neither."""


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "native":
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("another architecture")
        if request.param == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text():
            pytest.skip("this machine has no AVX2")
    flags = tuple(f"-march={request.param}" if flag == "-march=native" else flag for flag in build.FLAGS)
    monkeypatch.setattr(build, "FLAGS", flags)
    return str(request.param)


@pytest.fixture(params=list(NAMES), ids=list(NAMES.values()))
def kernels(request: pytest.FixtureRequest, instruction_set: str) -> CpuKernels:
    loaded = load_kernels(request.param)
    assert loaded is not None
    return loaded


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_instructions_are_named(instruction_set: str, tmp_path: Path) -> None:
    expected = {"x86-64-v3": "AVX2", "x86-64-v2": "SSSE3"}.get(instruction_set)
    kernels = load_kernels(torch.float32)
    assert kernels is not None
    assert kernels.variant
    assert expected in (None, kernels.variant)
    assert build.compiled_variant() == kernels.variant
    save_tiny(tmp_path, "llama")
    for cpu_kernels, name in ((True, kernels.variant), (False, "PyTorch")):
        start = Start(config(tmp_path, cpu_kernels=cpu_kernels), RankSpec(), str(tmp_path))
        assert ModelRunner().load(start, lambda _: None).kernels == name


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 24, 25, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 1), (64, 64), (48, 100), (576, 960)])
def test_linear(kernels: CpuKernels, rows: int, inputs: int, outputs: int) -> None:
    x, weight = (
        numbers(rows, inputs, dtype=kernels.dtype),
        numbers(outputs, inputs, dtype=kernels.dtype, seed=1),
    )
    bias = numbers(outputs, seed=2)
    expected = F.linear(x.double(), weight.double(), bias.double())
    packed = kernels.pack(weight)
    got = kernels.linear(packed, bias, outputs, inputs)(x)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    unbiased = kernels.linear(packed, None, outputs, inputs)
    assert torch.equal(unbiased(x)[-1:], unbiased(x[-1:].contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 6, 13])
def test_weights_of_16_bits_give_what_their_float32_copy_gives(
    instruction_set: str, dtype: torch.dtype, rows: int
) -> None:
    kernels = load_kernels(torch.float32)
    assert kernels is not None
    weight = numbers(100, 576, seed=1).to(dtype)
    # The limits of the formats: subnormal numbers, the least and the largest, and both zeros.
    limits = torch.finfo(dtype)
    weight[0, :5] = torch.tensor([limits.smallest_normal / 4, limits.tiny, limits.max / 1e6, 0.0, -0.0])
    x = numbers(rows, 576)
    narrow, wide = kernels.pack(weight), kernels.pack(weight.float())
    assert narrow.dtype == dtype
    assert narrow.nbytes == wide.nbytes / 2
    products = [kernels.linear(packed, None, 100, 576)(x) for packed in (narrow, wide)]
    assert torch.equal(*products)
    assert kernels.linear(kernels.pack(torch.full((1, 16), torch.inf, dtype=dtype)), None, 1, 16)(
        torch.ones(1, 16)
    ).isinf()


def test_weights_that_the_arithmetic_would_round_are_refused(instruction_set: str) -> None:
    kernels = load_kernels(torch.bfloat16)
    assert kernels is not None
    with pytest.raises(TypeError, match="float16"):
        kernels.pack(torch.ones(16, 16, dtype=torch.float16))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 20])
def test_quantized_linear(kernels: CpuKernels, bits: Bits, rows: int) -> None:
    x, weight = numbers(rows, 96, dtype=kernels.dtype), quantize(numbers(100, 96, seed=1), bits)
    bias = numbers(100, seed=2)
    multiply = kernels.linear(kernels.pack_quantized(weight), bias, 100, 96)
    expected = F.linear(x.double(), weight.dequantize().double(), bias.double())
    error = (multiply(x).double() - expected).norm() / expected.norm()
    assert error < 0.01  # inputs are rounded to eight bits
    assert torch.equal(multiply(x)[-1:], multiply(x[-1:].contiguous()))


def test_a_product_is_the_same_with_and_without_avx_512(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of each sum does not depend on the width of vectors, and both have fused multiply-add."""
    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine has no AVX-512")
    x, weight = numbers(7, 96), numbers(100, 96, seed=1)
    products = []
    for march in ("native", "x86-64-v3"):
        flags = tuple(f"-march={march}" if flag == "-march=native" else flag for flag in build.FLAGS)
        with monkeypatch.context() as patch:
            patch.setattr(build, "FLAGS", flags)
            kernels = load_kernels(torch.float32)
        assert kernels is not None
        packed = [kernels.pack(weight)]
        packed += [kernels.pack_quantized(quantize(weight, bits)) for bits in BITS]
        products.append(torch.stack([kernels.linear(each, None, 100, 96)(x) for each in packed]))
    assert torch.equal(*products)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_add_rms_norm(kernels: CpuKernels, rows: int) -> None:
    x, delta, weight = numbers(rows, 96), numbers(rows, 96, seed=1), numbers(96, seed=2)
    expected = F.rms_norm(x + delta, (96,), weight, 1e-5)
    stream = x.clone()
    got = kernels.add_rms_norm(stream, delta, weight, 1e-5)
    torch.testing.assert_close(stream, x + delta)
    tolerance = TOLERANCE[kernels.dtype]
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gelu", [False, True])
def test_gate_and_mul(kernels: CpuKernels, gelu: bool) -> None:
    gate_up = torch.cat((torch.linspace(-120, 120, 64), numbers(64))).repeat(9, 1)
    gate = F.gelu(gate_up[:, :64], approximate="tanh") if gelu else F.silu(gate_up[:, :64])
    tolerance = TOLERANCE[kernels.dtype]
    found = kernels.gate_and_mul(gate_up, gelu=gelu).float()
    torch.testing.assert_close(found, gate * gate_up[:, 64:], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [1, 63, 64, 1000])
def test_the_most_likely_token_is_the_first_of_the_largest(kernels: CpuKernels, size: int) -> None:
    logits = torch.randint(-20, 3, (7, size + 5), generator=torch.Generator().manual_seed(size)).float()
    logits = logits[:, :size]  # rows that do not follow each other at once
    expected = [row.tolist().index(max(row.tolist())) for row in logits]
    greedy = [(0.0, 0, 1.0, 0.0)] * 7
    assert kernels.choose_tokens(logits, greedy, [0.0] * 7).tolist() == expected
    assert choose_tokens(logits, greedy, [0.0] * 7).tolist() == expected
    nothing = torch.full((7, size), -torch.inf)
    assert kernels.choose_tokens(nothing, greedy, [0.0] * 7).tolist() == [0] * 7


def test_layers_have_the_same_outcome_in_one_call_and_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "llama")
    model = LogitsModel(tmp_path, dtype="bfloat16")
    model.add(0, random_tokens(9, 1), [0, 1, 2])
    whole = model.step((0, 0, 9))[0]
    monkeypatch.setattr("ullm.model.kernels.cpu.ops.CALL_OPERATIONS", 1)
    assert torch.equal(model.step((0, 0, 9))[0], whole)


def test_tiles_cover_each_query_once() -> None:
    lens = [1, 1, 7, 3, 12]
    layout = BatchLayout(*(np.empty(0),) * 2, lens, lens, *(np.empty(0),) * 2, 2)  # type: ignore[arg-type]
    starts = layout.starts
    covered = [
        (sequence, token)
        for sequence, first, count in tiles(layout, 4).tolist()
        for token in range(first, first + count)
    ]
    assert covered == [(i, t) for i in range(5) for t in range(starts[i], starts[i + 1])]


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"qwen3"}))  # whose heads do not suit the kernels
def test_models_have_the_same_logits_with_and_without(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, name)
    prompt = random_tokens(23, seed=3)
    results = []
    for cpu_kernels in (True, False):
        model = LogitsModel(tmp_path, cpu_kernels=cpu_kernels)
        assert isinstance(model.backend, KernelAttention if cpu_kernels else GatherAttention)
        model.add(0, [*prompt, 5, 6, 7], list(range(20)))
        results.append([model.step((0, 0, 9))[0], model.step((0, 9, 14))[0], model.step((0, 23, 1))[0]])
    for with_kernels, without in zip(*results, strict=True):
        torch.testing.assert_close(with_kernels.float(), without.float(), rtol=1e-4, atol=1e-4)


def test_in_bfloat16_a_text_is_the_same_alone_among_others_in_chunks_and_resumed(
    tmp_path: Path, threads: None
) -> None:
    save_tiny(tmp_path, "llama")
    prompts = [random_tokens(count, seed=count) for count in (1, 5, 16, 33, 70, 101)]
    alone = [outputs(tmp_path, [prompt], chunk=1000)[0] for prompt in prompts]
    assert outputs(tmp_path, prompts, chunk=1000) == alone
    assert outputs(tmp_path, prompts, chunk=7) == alone
    assert outputs(tmp_path, prompts, chunk=30, lose_after=9) == alone
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert outputs(tmp_path, prompts, chunk=1000) == alone


def test_logits_in_bfloat16_are_bitwise_the_same(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3-bias")
    prompt = random_tokens(40, seed=1)
    whole = LogitsModel(tmp_path, dtype="bfloat16")
    whole.add(0, prompt, list(range(12)))
    expected = whole.step((0, 0, 40))[0]
    parts = LogitsModel(tmp_path, dtype="bfloat16")
    parts.add(1, random_tokens(30, seed=2), list(range(20, 32)))
    parts.add(0, prompt, list(range(12)))
    got = [
        parts.step((1, 0, 20), (0, 0, 11))[0],
        parts.step((1, 20, 1), (0, 11, 1))[0],
        parts.step((0, 12, 28))[0],
    ]
    assert torch.equal(torch.cat(got), expected)


@pytest.mark.parametrize("window", [None, 600])
def test_a_long_context_is_the_same_in_parts_on_threads_in_chunks_and_in_pytorch(
    window: int | None, tmp_path: Path
) -> None:
    reference = save_tiny(tmp_path, "mistral")
    reference.config.update({"max_position_embeddings": 2048, "sliding_window": window})
    reference.config.save_pretrained(tmp_path)
    prompt, blocks = random_tokens(1300, seed=1), list(range(330))

    def logits(*steps: tuple[int, int], threads: int = 1, **options: Any) -> Tensor:
        model = LogitsModel(tmp_path, num_blocks=700, **options)
        if isinstance(model.backend, KernelAttention):
            cast(KernelOps, cast(Decoder, model.model).ops).kernels.use_threads(threads)
        model.add(0, prompt, blocks)
        model.add(1, prompt, list(range(330, 660)))  # a companion, so that tiles are many
        got = [model.step((0, first, count), (1, first, count))[0] for first, count in steps[:-1]]
        return torch.cat([*got, model.step((0, *steps[-1]))[0]])

    whole = logits((0, 1300))
    plain = logits((0, 1300), cpu_kernels=False)
    torch.testing.assert_close(whole, plain, rtol=1e-4, atol=1e-4)
    cuts = (0, 511, 512, 513, 1024, 1025, 1290, *range(1291, 1301))
    assert torch.equal(logits(*((a, b - a) for a, b in pairwise(cuts))), whole)
    assert torch.equal(logits(*((a, b - a) for a, b in pairwise(cuts)), threads=2), whole)
    assert torch.equal(logits((0, 1300), threads=3), whole)


def test_without_a_compiler_the_model_runs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "llama")
    prompt = random_tokens(9, seed=4)
    logits = []
    for found in (shutil.which, lambda name: None):
        monkeypatch.setattr("shutil.which", found)
        model = LogitsModel(tmp_path)
        model.add(0, prompt, list(range(3)))
        logits.append(model.step((0, 0, 9))[0])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_a_compiler_that_fails_is_told_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ULLM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert load_kernels(torch.float32) is None
    assert "without fused kernels" in caplog.text
    assert not list((tmp_path / "kernels").glob("*.so"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [4, 5, 16])
def test_what_is_left_in_the_pages_counts_for_nothing(block_size: int, dtype: str, tmp_path: Path) -> None:
    """Not even a NaN of another sequence beside the last token of a block, or of this sequence."""
    save_tiny(tmp_path, "llama")
    blocks, tokens = list(range(-(-24 // block_size))), random_tokens(24, seed=3)
    results = []
    for left_over in (0.0, torch.nan):
        model = LogitsModel(tmp_path, dtype=dtype, block_size=block_size)
        assert isinstance(model.backend, KernelAttention)
        for pages in model.backend.pages:
            pages.fill_(left_over)
        model.add(0, tokens, blocks)
        results.append(
            [model.step((0, start, count))[0] for start, count in ((0, 7), (7, 1), (8, 1), (9, 14))]
        )
    for fresh, reused in zip(*results, strict=True):
        assert fresh.isfinite().all()
        assert torch.equal(fresh, reused)
