"""GGUF's block formats that consist of codes with scales. Only scales are rounded when they are read.

Layouts are those of ggml-common.h and gguf-py/gguf/quants.py. A group of 32 values has four-bit codes with a
scale and a minimum (Q4_0, Q4_1, Q4_K) or eight-bit codes with a scale (Q8_0).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from ullm.model.layers.quantization import GROUP, ZERO, Bits, QuantizedWeight

Bytes = npt.NDArray[np.uint8]
Groups = tuple[Tensor, Tensor, Tensor]
"""Codes ``[blocks, values]``, scales and minima ``[blocks, groups]``."""


def has_codes(kind: GGMLQuantizationType) -> bool:
    """Return True if `read_codes` knows the format."""
    return kind in _READERS


def read_codes(raw: Bytes, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> QuantizedWeight:
    """Return a tensor's codes.

    Args:
        raw: the tensor's bytes as stored.
        kind: a format that `has_codes`.
        shape: ``(out, in)``.
    """
    bits, read = _READERS[kind]
    codes, scales, minima = read(torch.from_numpy(raw.reshape(-1, GGML_QUANT_SIZES[kind][1]).copy()))
    groups = (shape[0], shape[1] // GROUP)
    format_bits = torch.full((shape[0],), bits, dtype=torch.uint8)
    scales, minima = (values.to(torch.float16).reshape(groups) for values in (scales, minima))
    return QuantizedWeight(codes.reshape(shape), scales, minima, format_bits, bits)


def _float16(blocks: Tensor, first: int) -> Tensor:
    """Return the float16 at an offset of each block, ``[blocks, 1]``."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16)


def _halves(packed: Tensor) -> Tensor:
    """Return all low halves of the bytes, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _q4_0(blocks: Tensor) -> Groups:
    scales = _float16(blocks, 0)
    return _halves(blocks[:, 2:]), scales, -8 * scales


def _q4_1(blocks: Tensor) -> Groups:
    return _halves(blocks[:, 4:]), _float16(blocks, 0), _float16(blocks, 2)


def _q8_0(blocks: Tensor) -> Groups:
    scales = _float16(blocks, 0)
    return blocks[:, 2:] ^ ZERO, scales, torch.zeros_like(scales)  # from two's complement to an offset of 128


def _q4_k(blocks: Tensor) -> Groups:
    """Read blocks of 8 groups, whose six-bit scales and minima share two float16 factors."""
    scale, minimum, packed = _float16(blocks, 0).float(), _float16(blocks, 2).float(), blocks[:, 4:16]
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((low & 63, rest & 15 | low >> 6 << 4), 1)
    minima = torch.cat((high & 63, rest >> 4 | high >> 6 << 4), 1)
    codes = _halves(blocks[:, 16:].reshape(-1, 4, GROUP))
    return codes, scale * scales, -minimum * minima


_READERS: dict[GGMLQuantizationType, tuple[Bits, Callable[[Tensor], Groups]]] = {
    GGMLQuantizationType.Q4_0: (4, _q4_0),
    GGMLQuantizationType.Q4_1: (4, _q4_1),
    GGMLQuantizationType.Q4_K: (4, _q4_k),
    GGMLQuantizationType.Q8_0: (8, _q8_0),
}
