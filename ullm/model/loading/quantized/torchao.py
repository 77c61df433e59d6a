"""torchao, as transformers saves it in safetensors: codes beside scales and zeros, under names of its own.

``<layer>._weight_qdata [out, in]`` in int8 or FP8, ``<layer>._weight_scale`` for all, per output or per group
of inputs, and ``<layer>._weight_zero_point`` shaped as the scale. int8 also holds codes of fewer bits (int4
of ``IntxWeightOnlyConfig``), around zero. The packings of ``Int4WeightOnlyConfig`` are those of kernels for
GPUs, and are refused. Quantized activations are computed from float ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ullm.errors import ModelFileBroken, ModelUnsupported
from ullm.model.layers.quantization import QuantizedWeight
from ullm.model.loading.quantized import grid
from ullm.model.loading.quantized.interface import (
    REMEDY,
    FoundConfig,
    Part,
    StoredWeight,
    check_shape,
    require,
    split_last,
)
from ullm.model.loading.quantized.scaled import CODES, Scaled

SCHEMES = frozenset(
    {
        *("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"),
        *("Int8StaticActivationInt8WeightConfig", "IntxWeightOnlyConfig"),
        *("Int8DynamicActivationIntxWeightConfig", "Float8WeightOnlyConfig"),
        "Float8DynamicActivationFloat8WeightConfig",
    }
)
"""Names of torchao's classes whose weights are stored as in this module."""
PER_LAYER = frozenset({"FqnToConfig", "ModuleFqnToConfig"})
"""Classes that name another one for each layer."""
PARTS = {
    **{f"_weight_{name}": name for name in ("qdata", "scale", "zero_point", "act_pre_scale")},
    **dict.fromkeys(("_weight_act_quant_scale", "_weight_act_quant_zero_point"), ""),
}
SCALES = frozenset({"F32", "BF16", "F16", "F64"})
"""Dtypes of scales; others, such as those of MX formats, have a meaning of their own."""


class Torchao:
    """See the module."""

    name = "torchao"

    def __init__(self, config: FoundConfig) -> None:
        found = config.values.get("quant_type")
        made = found.get("default") if isinstance(found, Mapping) else found
        schemes = list(_schemes(made))
        for scheme in schemes or [{}]:
            kind = str(scheme.get("_type") or made or "no named scheme")
            if kind not in SCHEMES:
                raise config.unsupported(f"torchao with {kind:.60}")
        self._bits = [_bits(scheme) for scheme in schemes]
        self._scaled = Scaled(self.name, FoundConfig(config.file, {}))

    def split(self, name: str, stored: str) -> tuple[str, str] | None:
        """See `Format.split`."""
        return split_last(name, PARTS)

    def weight(self, name: str, parts: Mapping[str, Part]) -> StoredWeight:
        """See `Format.weight`."""
        codes, scale = require(name, parts, "qdata", "scale")
        if codes.stored not in CODES or scale.stored not in SCALES:
            raise ModelUnsupported(
                f"{codes.file}: tensor {name!r} is stored in {codes.stored} with scales in {scale.stored}, "
                f"which is not supported; {REMEDY}"
            )
        if "act_pre_scale" in parts:
            raise ModelUnsupported(
                f"{codes.file}: tensor {name!r} needs its inputs scaled (act_pre_scale), which is not "
                f"supported; {REMEDY}"
            )
        zero = parts.get("zero_point")
        renamed = {"weight": codes, "weight_scale": scale}
        stored = self._scaled.weight(
            name, renamed if zero is None else {**renamed, "weight_zero_point": zero}
        )
        if codes.stored != "I8" or not self._bits or max(self._bits) > 4:
            return stored
        return StoredWeight(stored.shape, stored.values, _four_bits(codes, scale, zero))


def _schemes(value: Any) -> Iterator[Mapping[str, Any]]:
    """Return the configs in what a checkpoint says, each an object with ``_type`` and ``_data``."""
    if not isinstance(value, Mapping):
        return
    if value.get("_type") not in PER_LAYER:
        yield value
        return
    data = value.get("_data")
    for inner in data.values() if isinstance(data, Mapping) else ():
        for each in inner.values() if isinstance(inner, Mapping) else ():
            yield from _schemes(each)


def _bits(scheme: Mapping[str, Any]) -> int:
    """Return the bits of a scheme's weights: eight, unless it names a dtype of fewer."""
    data = scheme.get("_data")
    dtype = data.get("weight_dtype") if isinstance(data, Mapping) else None
    named = re.fullmatch(r"int([1-8])", str(dtype.get("_data")) if isinstance(dtype, Mapping) else "")
    return int(named[1]) if named else 8


def _four_bits(codes: Part, scale: Part, zero: Part | None) -> Any:
    """Return a function for `StoredWeight.codes`; None if the kernels cannot compute with the codes.

    Raises:
        ModelFileBroken: a code has more than four bits.
    """
    outputs, inputs = codes.shape
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    check_shape(scale, (outputs, groups), (1, 1), (1,), (outputs,))
    size = -(-inputs // max(1, groups))
    least, most = torch.aminmax(codes.read())
    if int(least) < -8 or int(most) > 7:
        raise ModelFileBroken(codes.file, f"tensor {codes.name!r} has codes of more than four bits")

    def lattice() -> tuple[Tensor, Tensor]:
        scales = scale.read().float().reshape(-1, groups).expand(outputs, groups)
        zeros = torch.zeros(1, 1) if zero is None else zero.read().float().reshape(-1, groups)
        return scales, zeros.expand(outputs, groups) + 8

    def packed() -> QuantizedWeight:
        return grid.pack(codes.read().int() + 8, *lattice(), size, 4)

    return packed if grid.packable(inputs, size, *lattice(), 4) else None
