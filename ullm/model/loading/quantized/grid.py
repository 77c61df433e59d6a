"""Weights that are ``scale * (code - zero)``, with a scale and a zero per group of inputs.

All formats of whole numbers come down to this; so their codes can be handed to the kernels, whose groups are
of 32 inputs, if the groups of the checkpoint are multiples of that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ullm.errors import ModelFileBroken
from ullm.model.layers.quantization import GROUP, ZERO, Bits, QuantizedWeight, num_groups
from ullm.model.loading.quantized.interface import Part

HALF_ERROR = 2.0**-10
"""Most that a scale may change when it is rounded to float16, relatively; smaller ones have fewer digits."""


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack unsigned codes from int32 along the last dimension, the lowest bits first.

    Args:
        packed: ``[…, n]``; each holds ``32 // bits`` codes.
        count: how many codes there are per row; what is left over is padding.

    Returns:
        uint8 ``[…, count]``.
    """
    per = 32 // bits
    shifts = torch.arange(0, per * bits, bits, dtype=torch.int32)
    codes = (packed.to(torch.int32)[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).reshape(*packed.shape[:-1], -1)[..., :count]


def spread(groups: Tensor, size: int, inputs: int) -> Tensor:
    """Repeat a value per group, ``[out, groups]``, for each of the inputs: ``[out, inputs]``."""
    return groups.repeat_interleave(size, 1)[:, :inputs]


def checked_index(part: Part, groups: int) -> Tensor:
    """Return the group of each input; negative ones count from the last.

    Raises:
        ModelFileBroken: there is no such group.
    """
    index = part.read().long()
    if len(index) and not (-groups <= int(index.min()) and int(index.max()) < groups):
        raise ModelFileBroken(
            part.file, f"tensor {part.name!r} names groups beyond the {groups} that there are"
        )
    return torch.where(index < 0, index + groups, index)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, index: Tensor) -> Tensor:
    """Return ``scale * (code - zero)`` in float32.

    Args:
        codes: ``[out, in]``.
        scales, zeros: ``[out, groups]``.
        index: ``[in]``, the group of each input.
    """
    index = index.long()
    return (codes.float() - zeros.float()[:, index]) * scales.float()[:, index]


def packable(inputs: int, size: int, scales: Tensor, zeros: Tensor, bits: int) -> bool:
    """Return True if the kernels can compute with such codes.

    Groups must be made of the kernels' groups, and float16 must hold scales and minima nearly as well as its
    normal numbers. Codes of more than four bits have no minimum of their own: their zero is in the middle.

    Args:
        size: neighbouring inputs of a group.
        scales, zeros: ``[out, groups]``.
        bits: of the codes.
    """
    if size < inputs and size % GROUP:
        return False
    scales, zeros = scales.float(), zeros.float()
    if bits > 4:
        return _fits(scales) and bool((zeros == 1 << (bits - 1)).all())
    return _fits(scales) and _fits(scales * zeros)


def pack(codes: Tensor, scales: Tensor, zeros: Tensor, size: int, bits: int) -> QuantizedWeight:
    """Return codes for the kernels; see `packable`.

    Four bits are exact but for the rounding of ``scale`` and of ``scale * zero`` to float16, more bits
    but for that of ``scale``.

    Args:
        codes: ``[out, in]``, from 0.
        scales, zeros: ``[out, groups]``, in groups of ``size`` inputs.
        bits: of the codes.
    """
    outputs, inputs = codes.shape
    wanted: Bits = 4 if bits <= 4 else 8
    repeat = -(-min(size, inputs) // GROUP)
    weight = QuantizedWeight.empty(outputs, inputs, wanted)
    scales, zeros = (
        each.float().repeat_interleave(repeat, 1)[:, : num_groups(inputs)] for each in (scales, zeros)
    )
    weight.scales.copy_(scales)
    if wanted == 4:
        weight.codes.copy_(codes)
        weight.minima.copy_(-scales * zeros)
    else:
        weight.codes.copy_(codes.int() + (ZERO - (1 << (bits - 1))))
    return weight


def _fits(values: Tensor) -> bool:
    """Return True if float16 holds all values nearly as well as its normal numbers."""
    rounded = values.half().float()
    return bool(((rounded - values).abs() <= HALF_ERROR * values.abs()).all())
