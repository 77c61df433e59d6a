"""Weights of eight and four bits: their codes, the kernels that multiply by them, models that have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ullm.model.kernels.cpu import build
from ullm.model.kernels.cpu.kernels import NAMES, CpuKernels, load_kernels
from ullm.model.layers.quantization import (
    GROUP,
    ZERO,
    Bits,
    QuantizedWeight,
    join_quantized,
    num_groups,
    quantize,
)

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=list(NAMES), ids=list(NAMES.values()))
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    found = load_kernels(request.param)
    assert found is not None
    return found


# --- codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [32, 96, 80])
def test_a_quantized_weight_is_the_nearest(bits: Bits, inputs: int) -> None:
    weight = numbers(50, inputs)
    found = quantize(weight, bits)
    step = found.scales.float().repeat_interleave(GROUP, 1)[:, :inputs]
    assert ((found.dequantize() - weight).abs() <= 0.52 * step + 1e-3).all()
    assert found.codes.max() == (255 if bits == 8 else 15)


def test_groups_of_equal_weights_and_of_zeros_are_exact() -> None:
    weight = torch.cat((torch.zeros(3, 32), torch.full((3, 32), 0.75)), 1)
    assert torch.equal(quantize(weight, 4).dequantize(), weight)
    torch.testing.assert_close(quantize(weight, 8).dequantize(), weight, rtol=1e-3, atol=0)


def test_quantizing_what_was_quantized_changes_nothing() -> None:
    for bits in (8, 4):
        once = quantize(numbers(20, 64), bits).dequantize()
        again = quantize(once, bits).dequantize()
        torch.testing.assert_close(again, once, rtol=1e-3, atol=1e-3)


def test_slices_are_those_of_the_numbers() -> None:
    weight = quantize(numbers(40, 128), 4)
    whole = weight.dequantize()
    for dim, start, count in ((0, 3, 9), (1, 32, 64), (1, 96, 32), (1, 5, 40)):
        part = weight.narrow(dim, start, count)
        values = part if isinstance(part, Tensor) else part.dequantize()
        assert torch.equal(values, whole.narrow(dim, start, count))


def test_parts_of_different_formats_lie_side_by_side() -> None:
    store, rows = QuantizedWeight.empty(100, 64, wanted=8), numbers(100, 64)
    store[:40].copy_(quantize(rows[:40], 4))
    store[40:].copy_(rows[40:])
    assert store.parts() == [(4, 0, 40), (8, 40, 60)]
    expected = torch.cat((quantize(rows[:40], 4).dequantize(), quantize(rows[40:], 8).dequantize()))
    assert torch.equal(store.dequantize(), expected)


# --- kernels -----------------------------------------------------------------------------------


def reference(x: Tensor, weight: QuantizedWeight, bias: Tensor) -> Tensor:
    """Compute what quantized.cpp does, in float64: inputs have eight bits per group, too."""
    rows, inputs = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, num_groups(inputs) * GROUP - inputs))
    groups = padded.view(rows, -1, GROUP)
    most = groups.abs().amax(2, keepdim=True)
    inverse = torch.full_like(most, 127).div(most)  # `127 / most` would be rounded twice
    codes = (groups.double() * torch.where(most > 0, inverse, 0.0)).round()
    quantized = (codes * (most / 127).double()).view(rows, -1)[:, :inputs]
    return quantized @ weight.dequantize().double().T + bias.double()


def mixed(outputs: int, inputs: int) -> QuantizedWeight:
    """Four bits, and then eight."""
    store, values = QuantizedWeight.empty(outputs, inputs, wanted=4), numbers(outputs, inputs, seed=1)
    half = outputs // 2
    store[:half].copy_(values[:half])
    store[half:].copy_(quantize(values[half:], 8))
    return store


@needs_compiler
@pytest.mark.parametrize("bits", ["8", "4", "mixed"])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 49, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 1), (64, 64), (48, 100), (576, 320)])
def test_linear(kernels: CpuKernels, bits: str, rows: int, inputs: int, outputs: int) -> None:
    x, bias = numbers(rows, inputs).to(kernels.dtype), numbers(outputs, seed=2)
    if bits == "mixed":
        weight = mixed(outputs, inputs)
    else:
        weight = quantize(numbers(outputs, inputs, seed=1), 8 if bits == "8" else 4)
    multiply = kernels.linear(kernels.pack_quantized(weight), bias, outputs, inputs)
    torch.testing.assert_close(multiply(x).double(), reference(x, weight, bias), rtol=1e-4, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_is_the_same_alone_and_in_any_batch_on_any_number_of_threads(
    kernels: CpuKernels, bits: Bits
) -> None:
    weight = quantize(numbers(200, 576, seed=1), bits)
    multiply = kernels.linear(kernels.pack_quantized(weight), numbers(200, seed=2), 200, 576)
    x = numbers(120, 576).to(kernels.dtype)
    alone = torch.cat([multiply(x[i : i + 1].contiguous()) for i in range(len(x))])
    try:
        for threads in (1, 2, 3, 8):
            kernels.use_threads(threads)
            for rows in (2, 3, 4, 5, 6, 7, 16, 24, 49, 120):
                assert torch.equal(multiply(x[:rows].contiguous()), alone[:rows])
    finally:
        kernels.use_threads(1)


@needs_compiler
def test_inputs_of_all_sizes_keep_their_accuracy(kernels: CpuKernels) -> None:
    weight = quantize(numbers(32, 64, seed=1), 8)
    multiply = kernels.linear(kernels.pack_quantized(weight), None, 32, 64)
    for size in (0.0, 1e-20, 1e-3, 1e3, 1e20):
        x = (numbers(3, 64) * size).to(kernels.dtype)
        expected = reference(x, weight, torch.zeros(32))
        torch.testing.assert_close(multiply(x).double(), expected, rtol=1e-3, atol=1e-3 * size)


@needs_compiler
def test_codes_at_both_ends_do_not_overflow(kernels: CpuKernels) -> None:
    codes = torch.tensor([[255] * 64, [1] * 64], dtype=torch.uint8)
    scales, bits = torch.ones((2, 2), dtype=torch.float16), torch.full((2,), 8, dtype=torch.uint8)
    weight = QuantizedWeight(codes, scales, torch.zeros_like(scales), bits)
    x = torch.ones(1, 64, dtype=kernels.dtype)
    got = kernels.linear(kernels.pack_quantized(weight), None, 2, 64)(x)
    assert got.tolist() == [pytest.approx([64.0 * (255 - ZERO), 64.0 * (1 - ZERO)])]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_slices_of_whole_groups_are_joined_without_loss(bits: Bits, dim: int) -> None:
    """What a rank gets of a stored weight are the codes that one rank would use."""
    whole = quantize(torch.randn(5 * GROUP, 5 * GROUP, generator=torch.Generator().manual_seed(1)), bits)
    runs = ((GROUP, GROUP), (3 * GROUP, 2 * GROUP))
    joined = join_quantized([whole.narrow(dim, *run) for run in runs], dim)
    assert isinstance(joined, QuantizedWeight)
    expected = torch.cat([whole.dequantize().narrow(dim, *run) for run in runs], dim)
    assert torch.equal(joined.dequantize(), expected)


def test_slices_that_cut_groups_are_joined_as_numbers() -> None:
    whole = quantize(torch.randn(4, 3 * GROUP, generator=torch.Generator().manual_seed(1)), 8)
    runs = ((0, GROUP + 8), (2 * GROUP, GROUP))
    joined = join_quantized([whole.narrow(1, *run) for run in runs], 1)
    expected = torch.cat([whole.dequantize().narrow(1, *run) for run in runs], 1)
    assert isinstance(joined, torch.Tensor)
    assert torch.equal(joined, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_rank_quantizes_its_part_as_one_rank_would(bits: Bits) -> None:
    weight = torch.randn(8, 6 * GROUP, generator=torch.Generator().manual_seed(1))
    part = QuantizedWeight.empty(8, 3 * GROUP, bits)
    part.copy_(torch.cat((weight[:, :GROUP], weight[:, 4 * GROUP :]), 1))
    whole = quantize(weight, bits).dequantize()
    assert torch.equal(part.dequantize(), torch.cat((whole[:, :GROUP], whole[:, 4 * GROUP :]), 1))
