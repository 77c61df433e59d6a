"""Weights of eight or four bits with a scale per group of inputs, before a kernel packs them.

A group is 32 neighbouring inputs of one output, as in llama.cpp's block formats. With eight bits a weight is
``scale * (code - 128)``, with four ``scale * code + minimum``; scales and minima are float16. Weights are
rounded to the nearest code: with eight bits symmetrically, with four between the group's least and largest
weight. The head always has eight bits: with four, SmolLM2's perplexity rises by 5 %.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

GROUP = 32
"""Inputs that share a scale. As in kernels/cpu/quantized.cpp."""
ZERO = 128
"""The eight-bit code of zero."""
Bits = Literal[4, 8]
Scheme = Literal["stored", "int8", "int4"]
"""How linear layers are quantized: as stored in the checkpoint, or to these bits while they load."""
CHUNK = 1 << 22
"""Weights quantized at a time, so that float32 copies stay small."""


def num_groups(in_features: int) -> int:
    """Return the number of groups of a row; the last may be incomplete."""
    return -(-in_features // GROUP)


class QuantizedWeight:
    """A quantized weight ``[out, in]``, or a view of some of its rows or columns, in place of a parameter.

    Args:
        codes: uint8 ``[out, in]``.
        scales, minima: float16 ``[out, groups]``; minima are used with four bits only.
        bits: uint8 ``[out]``, 8 or 4 per output, since fused layers may have different formats.
        wanted: number of bits to quantize unquantized sources to.
        as_stored: keep the codes of a quantized checkpoint.
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
        """Return a weight of zeros."""
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
        """Bytes of memory before packing."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.minima, self.bits))

    def __getitem__(self, rows: slice | Tensor) -> QuantizedWeight:
        """Return some outputs; a view if ``rows`` is a slice."""
        codes, scales, minima, bits = self.codes[rows], self.scales[rows], self.minima[rows], self.bits[rows]
        return QuantizedWeight(codes, scales, minima, bits, self.wanted, as_stored=self.as_stored)

    def narrow(self, dim: int, start: int, count: int) -> QuantizedWeight | Tensor:
        """Return a slice as `torch.Tensor.narrow` does; in float32 if it cuts groups."""
        if dim == 0:
            return self[start : start + count]
        if start % GROUP or (count % GROUP and start + count != self.codes.shape[1]):
            return self.dequantize().narrow(dim, start, count)
        first, groups = start // GROUP, num_groups(count)
        scales, minima = self.scales.narrow(1, first, groups), self.minima.narrow(1, first, groups)
        return QuantizedWeight(self.codes.narrow(1, start, count), scales, minima, self.bits, self.wanted)

    def copy_(self, source: Tensor | QuantizedWeight) -> None:
        """Copy codes as they are, or quantize an unquantized source."""
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
        """Return the weights in float32."""
        offsets = torch.where(self.bits[:, None] == 8, -ZERO * self.scales.float(), self.minima.float())
        size = self.codes.shape[1]
        scales, offsets = (
            values.repeat_interleave(GROUP, 1)[:, :size] for values in (self.scales.float(), offsets)
        )
        return self.codes.float() * scales + offsets

    def parts(self) -> list[tuple[Bits, int, int]]:
        """Return runs of neighbouring outputs with the same number of bits: ``(bits, first, count)``."""
        values, counts = torch.unique_consecutive(self.bits, return_counts=True)
        runs, first = list[tuple[Bits, int, int]](), 0
        for bits, count in zip(values.tolist(), counts.tolist(), strict=True):
            runs.append((8 if bits == 8 else 4, first, count))
            first += count
        return runs


def join_quantized(parts: list[QuantizedWeight | Tensor], dim: int) -> QuantizedWeight | Tensor:
    """Return slices of a weight one after the other; in float32 if a seam along the inputs cuts a group."""
    if len(parts) == 1:
        return parts[0]
    whole = [part for part in parts if isinstance(part, QuantizedWeight)]
    if len(whole) < len(parts) or (dim == 1 and any(part.shape[1] % GROUP for part in whole[:-1])):
        plain = [part.dequantize() if isinstance(part, QuantizedWeight) else part for part in parts]
        return torch.cat(plain, dim)
    codes, scales, minima = (
        torch.cat([getattr(part, name) for part in whole], dim) for name in ("codes", "scales", "minima")
    )
    bits = torch.cat([part.bits for part in whole]) if dim == 0 else whole[0].bits
    return QuantizedWeight(codes, scales, minima, bits, whole[0].wanted)


def quantize(weight: Tensor, bits: Bits) -> QuantizedWeight:
    """Round ``weight [out, in]`` to codes."""
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
    """Return ``1 / scale`` per group, to multiply its weights by; 0 where the scale is 0."""
    inverse = scales.float().reciprocal()
    return torch.where(torch.isfinite(inverse), inverse, 0.0)[:, :, None]
