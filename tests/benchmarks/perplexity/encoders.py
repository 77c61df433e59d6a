"""GGUF's block formats that the gguf package can read but not write, by rounding to the nearest code.

Layouts are those that `gguf.quants` reads. llama.cpp's own quantizer searches for better scales, so its files
are a little better than these.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from gguf.quants import IQ4_NL

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
SUPER = 256
"""Weights of a block of the K formats and IQ4_XS."""


def encode(values: Floats, kind: Kind) -> Bytes:
    """Return a matrix in one of the formats of `ENCODERS`, ``[rows, bytes per row]``.

    Raises:
        ValueError: a row is not a multiple of the format's block.
    """
    size, encoder = ENCODERS[kind]
    if values.shape[1] % size:
        raise ValueError(f"{kind.name} has blocks of {size}, a row has {values.shape[1]} weights")
    blocks = encoder(values.reshape(-1, size).astype(np.float32))
    return np.ascontiguousarray(blocks).reshape(len(values), -1)


def _float16(values: Floats) -> tuple[Floats, Bytes]:
    """Return ``[blocks]`` as they are after rounding to float16, and their bytes."""
    rounded = values.astype(np.float16)
    return rounded.astype(np.float32), rounded.reshape(-1, 1).view(np.uint8)


def _over(values: Floats, divisor: Floats) -> Floats:
    return np.divide(values, divisor, out=np.zeros_like(values), where=divisor != 0)


def _codes(values: Floats, least: int, most: int) -> npt.NDArray[np.int64]:
    return np.clip(np.rint(values), least, most).astype(np.int64)


def _largest(groups: Floats) -> Floats:
    """Return the value of the largest magnitude of each group, with its sign."""
    index = np.abs(groups).argmax(-1, keepdims=True)
    return np.take_along_axis(groups, index, -1)[..., 0]


def _pack(codes: npt.NDArray[np.int64], axis: int, bits: int) -> Bytes:
    """Join codes along an axis: the first one into the lowest bits."""
    shifts = np.arange(codes.shape[axis]) * bits
    shape = [1] * codes.ndim
    shape[axis] = -1
    packed: Bytes = (codes << shifts.reshape(shape)).sum(axis).astype(np.uint8)
    return packed


def _flat(blocks: Bytes) -> Bytes:
    return blocks.reshape(len(blocks), -1)


def _with_minima(
    x: Floats, groups: int, code_bits: int, scale_bits: int
) -> tuple[npt.NDArray[np.int64], ...]:
    """Return codes ``[blocks, groups, …]``, scales and minima ``[blocks, groups]``, and the bytes of their
    factors."""
    parts, highest = x.reshape(len(x), groups, -1), (1 << scale_bits) - 1
    lowest = np.maximum(-parts.min(-1), 0)
    scales = (parts.max(-1) + lowest) / ((1 << code_bits) - 1)
    factor, factor_bytes = _float16(scales.max(-1) / highest)
    least, least_bytes = _float16(lowest.max(-1) / highest)
    scale_codes = _codes(_over(scales, np.broadcast_to(factor[:, None], scales.shape)), 0, highest)
    least_codes = _codes(_over(lowest, np.broadcast_to(least[:, None], lowest.shape)), 0, highest)
    step = (factor[:, None] * scale_codes)[..., None].astype(np.float32)
    offset = (least[:, None] * least_codes)[..., None].astype(np.float32)
    codes = _codes(_over(parts + offset, np.broadcast_to(step, parts.shape)), 0, (1 << code_bits) - 1)
    return codes, scale_codes, least_codes, factor_bytes.astype(np.int64), least_bytes.astype(np.int64)


def _q2_k(x: Floats) -> Bytes:
    codes, scales, minima, factor, least = _with_minima(x, 16, 2, 4)
    packed = _pack(codes.reshape(-1, 2, 4, 32), 2, 2)
    return np.hstack([scales | minima << 4, _flat(packed), factor, least]).astype(np.uint8)


def _six_bits(scales: npt.NDArray[np.int64], minima: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the 12 bytes of eight scales and minima."""
    low, high = scales[:, :4] | scales[:, 4:] >> 4 << 6, minima[:, :4] | minima[:, 4:] >> 4 << 6
    return np.hstack([low, high, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4])


def _q4_k(x: Floats) -> Bytes:
    codes, scales, minima, factor, least = _with_minima(x, 8, 4, 6)
    packed = _pack(codes.reshape(-1, 4, 2, 32), 2, 4)
    return np.hstack([factor, least, _six_bits(scales, minima), _flat(packed)]).astype(np.uint8)


def _q5_k(x: Floats) -> Bytes:
    codes, scales, minima, factor, least = _with_minima(x, 8, 5, 6)
    high, low = _pack(codes >> 4, 1, 1), _pack((codes & 15).reshape(-1, 4, 2, 32), 2, 4)
    return np.hstack([factor, least, _six_bits(scales, minima), high, _flat(low)]).astype(np.uint8)


def _symmetric(x: Floats, group: int, code: int, scale: int) -> tuple[Bytes, npt.NDArray[np.int64], Floats]:
    """Return the factor's bytes, the scales' codes, and each weight over its scale, ``[blocks, groups, …]``.

    Args:
        group: weights that share a scale.
        code: the code that the largest weight of a group becomes.
        scale: the largest code of a scale.
    """
    parts = x.reshape(len(x), -1, group)
    scales = _largest(parts) / np.float32(code)
    factor, factor_bytes = _float16(np.abs(scales).max(-1) / scale)
    codes = _codes(_over(scales, np.broadcast_to(factor[:, None], scales.shape)), -scale, scale)
    step = (factor[:, None] * codes)[..., None].astype(np.float32)
    return factor_bytes, codes, _over(parts, np.broadcast_to(step, parts.shape))


def _q3_k(x: Floats) -> Bytes:
    factor, scales, values = _symmetric(x, 16, -4, 31)
    codes, stored = _codes(values, -4, 3) + 4, scales + 32
    high = _pack((codes >> 2).reshape(-1, 8, 32), 1, 1)
    low = _pack((codes & 3).reshape(-1, 2, 4, 32), 2, 2)
    packed = [
        _pack((stored & 15).reshape(-1, 2, 8), 1, 4),
        _pack((stored >> 4).reshape(-1, 4, 4), 1, 2),
    ]
    return np.hstack([high, _flat(low), *packed, factor])


def _q6_k(x: Floats) -> Bytes:
    factor, scales, values = _symmetric(x, 16, -32, 127)
    codes = _codes(values, -32, 31) + 32
    low = _pack((codes & 15).reshape(-1, 2, 2, 64), 2, 4)
    high = _pack((codes >> 4).reshape(-1, 2, 4, 32), 2, 2)
    return np.hstack([_flat(low), _flat(high), scales.astype(np.int8).view(np.uint8), factor])


def _nearest(values: Floats) -> npt.NDArray[np.int64]:
    """Return the indices of the nearest of IQ4's sixteen values."""
    table = np.array(IQ4_NL.kvalues, dtype=np.float32)
    return np.searchsorted((table[1:] + table[:-1]) / 2, values)


def _iq4_nl(x: Floats) -> Bytes:
    scale, scale_bytes = _float16(_largest(x) / np.float32(IQ4_NL.kvalues[0]))
    indices = _nearest(_over(x, np.broadcast_to(scale[:, None], x.shape)))
    return np.hstack([scale_bytes, _pack(indices.reshape(-1, 2, 16), 1, 4)])


def _iq4_xs(x: Floats) -> Bytes:
    factor, scales, values = _symmetric(x, 32, IQ4_NL.kvalues[0], 31)
    stored = scales + 32
    high = ((stored >> 4) << np.arange(0, 16, 2)).sum(1).astype(np.uint16).reshape(-1, 1).view(np.uint8)
    low = _pack((stored & 15).reshape(-1, 4, 2), 2, 4)
    return np.hstack([factor, high, low, _flat(_pack(_nearest(values).reshape(-1, 8, 2, 16), 2, 4))])


ENCODERS: dict[Kind, tuple[int, Callable[[Floats], Bytes]]] = {
    Kind.Q2_K: (SUPER, _q2_k),
    Kind.Q3_K: (SUPER, _q3_k),
    Kind.Q4_K: (SUPER, _q4_k),
    Kind.Q5_K: (SUPER, _q5_k),
    Kind.Q6_K: (SUPER, _q6_k),
    Kind.IQ4_NL: (32, _iq4_nl),
    Kind.IQ4_XS: (SUPER, _iq4_xs),
}
"""Format → weights of a block, and its encoder ``[blocks, weights]`` → ``[blocks, bytes]``."""
