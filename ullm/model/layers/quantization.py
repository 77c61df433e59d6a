"""Weights in eight or four bits with a scale per group of inputs, before a kernel packs them.

A group is 32 neighbouring inputs of one output, as in llama.cpp's block formats. In eight bits a weight is
``scale * (code - 128)``, in four ``scale * code + minimum``; scales and minima are float16. Weights are
quantized by rounding to the nearest code, eight bits symmetrically, four between the group's least and
largest weight. The head keeps eight bits: with four, SmolLM2's perplexity rises by 5 %.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

GROUP = 32
"""Inputs that share a scale. As in cpu/quantized.cpp."""
ZERO = 128
"""The code of zero in eight bits."""
Bits = Literal[4, 8]
Scheme = Literal["stored", "int8", "int4"]
"""How a model's linear layers are quantized: as the checkpoint has them, or when they are loaded."""
CHUNK = 1 << 22
"""Weights that are quantized at once, so that float32 copies stay small."""


def num_groups(in_features: int) -> int:
    """Groups of a row; the last may be incomplete."""
    return -(-in_features // GROUP)


class QuantizedWeight:
    """A weight ``[out, in]``, or a view of some rows or columns of one. Stands where a parameter would.

    Args:
        codes: uint8 ``[out, in]``.
        scales, minima: float16 ``[out, groups]``; minima are used in four bits only.
        bits: uint8 ``[out]``, 8 or 4: of each output, since layers are fused whose formats differ.
        wanted: bits of what is copied here from plain numbers.
        as_stored: codes that a checkpoint has are to be taken over.
    """

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        minima: Tensor,
        bits: Tensor,
        wanted: Bits = 8,
        *,
        as_stored: bool = False,
    ) -> None:
        self.codes, self.scales, self.minima, self.bits = codes, scales, minima, bits
        self.wanted: Bits = wanted
        self.as_stored = as_stored

    @classmethod
    def empty(
        cls, out_features: int, in_features: int, wanted: Bits, *, as_stored: bool = False
    ) -> QuantizedWeight:
        """All zero."""
        size = (out_features, num_groups(in_features))
        scales, minima = torch.zeros(size, dtype=torch.float16), torch.zeros(size, dtype=torch.float16)
        codes = torch.zeros((out_features, in_features), dtype=torch.uint8)
        bits = torch.full((out_features,), wanted, dtype=torch.uint8)
        return cls(codes, scales, minima, bits, wanted, as_stored=as_stored)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)``."""
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of memory, unpacked."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.minima, self.bits))

    def __getitem__(self, rows: slice | Tensor) -> QuantizedWeight:
        """Some outputs; a view if they are a slice."""
        codes, scales, minima, bits = self.codes[rows], self.scales[rows], self.minima[rows], self.bits[rows]
        return QuantizedWeight(codes, scales, minima, bits, self.wanted, as_stored=self.as_stored)

    def narrow(self, dim: int, start: int, count: int) -> QuantizedWeight | Tensor:
        """A slice, as of a tensor; in float32 where groups are cut."""
        if dim == 0:
            return self[start : start + count]
        if start % GROUP or (count % GROUP and start + count != self.codes.shape[1]):
            return self.dequantize().narrow(dim, start, count)
        first, groups = start // GROUP, num_groups(count)
        scales, minima = self.scales.narrow(1, first, groups), self.minima.narrow(1, first, groups)
        return QuantizedWeight(self.codes.narrow(1, start, count), scales, minima, self.bits, self.wanted)

    def copy_(self, source: Tensor | QuantizedWeight) -> None:
        """Take over codes as they are, or quantize plain numbers."""
        if isinstance(source, QuantizedWeight):
            self.codes.copy_(source.codes)
            self.scales.copy_(source.scales)
            self.minima.copy_(source.minima)
            self.bits.copy_(source.bits)
            return
        step = max(1, CHUNK // max(1, source.shape[1]))
        for first in range(0, source.shape[0], step):
            rows = slice(first, first + step)
            self[rows].copy_(quantize(source[rows], self.wanted))

    def dequantize(self) -> Tensor:
        """The weights in float32."""
        offsets = torch.where(self.bits[:, None] == 8, -ZERO * self.scales.float(), self.minima.float())
        size = self.codes.shape[1]
        scales, offsets = (
            values.repeat_interleave(GROUP, 1)[:, :size] for values in (self.scales.float(), offsets)
        )
        return self.codes.float() * scales + offsets

    def parts(self) -> list[tuple[Bits, int, int]]:
        """Neighbouring outputs of the same number of bits: ``(bits, first, count)``."""
        values, counts = torch.unique_consecutive(self.bits, return_counts=True)
        found, first = list[tuple[Bits, int, int]](), 0
        for bits, count in zip(values.tolist(), counts.tolist(), strict=True):
            found.append((8 if bits == 8 else 4, first, count))
            first += count
        return found


def quantize(weight: Tensor, bits: Bits) -> QuantizedWeight:
    """``weight [out, in]`` rounded to codes."""
    outputs, inputs = weight.shape
    padding = num_groups(inputs) * GROUP - inputs
    # Padding by a value of the last group changes neither its least nor its largest.
    padded = torch.cat((weight, weight[:, -1:].expand(-1, padding)), 1) if padding else weight
    groups = padded.reshape(outputs, -1, GROUP).float()
    if bits == 8:
        scales, minima = (groups.abs().amax(2) / 127).half(), torch.zeros(groups.shape[:2]).half()
        codes = (groups * _inverse(scales)).round_().clamp_(-127, 127).add_(ZERO)
    else:
        minima = groups.amin(2).half()
        scales = ((groups.amax(2) - minima.float()) / 15).half()
        codes = ((groups - minima.float()[:, :, None]) * _inverse(scales)).round_().clamp_(0, 15)
    codes = codes.to(torch.uint8).reshape(outputs, -1)[:, :inputs]
    return QuantizedWeight(codes, scales, minima, torch.full((outputs,), bits, dtype=torch.uint8), bits)


def _inverse(scales: Tensor) -> Tensor:
    """``1 / scale`` for each weight of a group; 0 where all of them are equal."""
    inverse = scales.float().reciprocal()
    return torch.where(torch.isfinite(inverse), inverse, 0.0)[:, :, None]
