"""MXFP4 (Open Compute Project, Microscaling Formats 1.0): E2M1 numbers, with a power of two per 32 inputs.

gpt-oss has ``<name>_blocks [experts, out, in / 32, 16]`` and ``<name>_scales [experts, out, in / 32]``, two
numbers per byte, the lower four bits first. The experts' weights are ``[experts, in, out]``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ullm.model.layers.quantization import ZERO, QuantizedWeight
from ullm.model.loading.quantized import grid
from ullm.model.loading.quantized.interface import FoundConfig, Part, StoredWeight, check_shape, require

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The positive numbers of E2M1; the highest of four bits is the sign."""
BLOCK = 32
"""Inputs that share a scale."""
BIAS = 127
"""A scale is two to the power of its byte less this."""


class Mxfp4:
    """See the module."""

    name = "mxfp4"

    def __init__(self, config: FoundConfig) -> None:
        pass

    def split(self, name: str, stored: str) -> tuple[str, str] | None:
        """See `Format.split`."""
        for part in ("blocks", "scales"):
            if name.endswith(f"_{part}") and stored == "U8":
                return name.removesuffix(f"_{part}"), part
        return None

    def weight(self, name: str, parts: Mapping[str, Part]) -> StoredWeight:
        """See `Format.weight`."""
        blocks, scales = require(name, parts, "blocks", "scales")
        check_shape(blocks, (*blocks.shape[:-1], BLOCK // 2))
        check_shape(scales, blocks.shape[:-1])
        experts, outputs, groups = blocks.shape[:-1]

        def values() -> Tensor:
            numbers = numbers_of(blocks.read()) * exponents(scales.read())[..., None]
            return numbers.reshape(experts, outputs, groups * BLOCK).transpose(1, 2)

        return StoredWeight((experts, groups * BLOCK, outputs), values)


def linear(packed: Part, scale: Part) -> StoredWeight:
    """Return a linear layer's weight: ``packed [out, in / 2]``, ``scale [out, in / 32]``.

    Twice a number is a whole one from -12 to 12, so the kernels compute with it exactly, in eight bits.
    """
    outputs, inputs = packed.shape[0], packed.shape[1] * 2
    check_shape(scale, (outputs, -(-inputs // BLOCK)))

    def values() -> Tensor:
        return numbers_of(packed.read()) * grid.spread(exponents(scale.read()), BLOCK, inputs)

    def lattice() -> tuple[Tensor, Tensor]:
        scales = exponents(scale.read()) / 2
        return scales, torch.full_like(scales, ZERO)

    def codes() -> QuantizedWeight:
        doubled = (numbers_of(packed.read()) * 2).int() + ZERO
        return grid.pack(doubled, *lattice(), BLOCK, 8)

    can_pack = grid.packable(inputs, BLOCK, *lattice(), 8)
    return StoredWeight((outputs, inputs), values, codes if can_pack else None)


def numbers_of(packed: Tensor) -> Tensor:
    """Return the numbers of ``[…, n]`` bytes: ``[…, 2 n]``."""
    table = torch.tensor((*NUMBERS, *(-number for number in NUMBERS)))
    codes = torch.stack((packed & 15, packed >> 4), -1)
    return table[codes.long()].flatten(-2)


def exponents(scales: Tensor) -> Tensor:
    """Return the powers of two of E8M0 bytes."""
    if scales.dtype != torch.uint8:
        return scales.float()
    return torch.ldexp(torch.ones(scales.shape), scales.int() - BIAS)
