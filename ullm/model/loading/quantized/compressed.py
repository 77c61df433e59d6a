"""compressed-tensors, as llm-compressor saves it: whole numbers packed into int32, or one of `scaled`.

``weight_packed [out, in * bits / 32]`` int32, packed along the inputs, with codes moved by half their range;
``weight_scale [out, groups]``; ``weight_zero_point [out * bits / 32, groups]``, packed along the outputs,
if it is not symmetric; ``weight_shape``; ``weight_g_idx [in]`` if the groups are not in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ullm.errors import ModelFileBroken
from ullm.model.layers.quantization import QuantizedWeight
from ullm.model.loading.quantized import grid, mxfp4
from ullm.model.loading.quantized.gptq import SIMPLE_BITS
from ullm.model.loading.quantized.interface import (
    FoundConfig,
    Part,
    StoredWeight,
    check_shape,
    require,
    split_last,
)
from ullm.model.loading.quantized.scaled import PARTS as SCALED_PARTS
from ullm.model.loading.quantized.scaled import Scaled

PACKED, MXFP4 = "pack-quantized", "mxfp4-pack-quantized"
FORMATS = frozenset({PACKED, MXFP4, "int-quantized", "float-quantized", "naive-quantized", "dense"})
PARTS = {**SCALED_PARTS, **{name: name for name in ("weight_packed", "weight_shape", "weight_g_idx")}}


class CompressedTensors:
    """See the module."""

    name = "compressed-tensors"

    def __init__(self, config: FoundConfig) -> None:
        groups = config.values.get("config_groups") or {}
        if not isinstance(groups, dict) or not all(isinstance(each, dict) for each in groups.values()):
            raise ModelFileBroken(config.file, "'config_groups' must be objects")
        whole = config.values.get("format") or PACKED
        used = {str(each.get("format") or whole) for each in groups.values()} or {str(whole)}
        for form in sorted(used - FORMATS - {"mixed-precision"}):
            raise config.unsupported(f"compressed-tensors in the format {form!r}")
        sparse = config.values.get("sparsity_config") or {}
        if sparse.get("format", "dense") != "dense":
            raise config.unsupported(f"compressed-tensors with sparsity in the format {sparse['format']!r}")
        if (config.values.get("transform_config") or {}).get("config_groups"):
            raise config.unsupported("compressed-tensors with transforms of the activations")
        self._weights = [each["weights"] for each in groups.values() if isinstance(each.get("weights"), dict)]
        self._is_mxfp4 = used == {MXFP4}
        for bits in (each.get("num_bits") for each in self._weights):
            if bits not in SIMPLE_BITS:  # of others, codes are split between words, or not, by release
                raise config.unsupported(f"compressed-tensors with {bits!s:.20} bits")
        blocks = [each["block_structure"] for each in self._weights if each.get("block_structure")]
        values = {"weight_block_size": blocks[0] if blocks else None}
        self._scaled = Scaled(self.name, FoundConfig(config.file, values))

    def split(self, name: str, stored: str) -> tuple[str, str] | None:
        """See `Format.split`."""
        return self._scaled.split(name, stored) or split_last(name, PARTS)

    def weight(self, name: str, parts: Mapping[str, Part]) -> StoredWeight:
        """See `Format.weight`."""
        if "weight" in parts:
            return self._scaled.weight(name, parts)
        packed, scale = require(name, parts, "weight_packed", "weight_scale")
        if self._is_mxfp4:
            return mxfp4.linear(packed, scale)
        (shape_part,) = require(name, parts, "weight_shape")
        check_shape(shape_part, (2,))
        outputs, inputs = (int(size) for size in shape_part.read().tolist())
        bits = self._bits(packed, outputs, inputs)
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        check_shape(scale, (outputs, groups), *([(outputs,), (1,)] if groups == 1 else []))
        size = -(-inputs // max(1, groups))
        zero, index = parts.get("weight_zero_point"), torch.arange(inputs) // size
        if zero is not None:
            check_shape(zero, (-(-outputs // (32 // bits)), groups))
        in_order = True
        if "weight_g_idx" in parts:
            check_shape(parts["weight_g_idx"], (inputs,))
            found = grid.checked_index(parts["weight_g_idx"], groups)
            in_order, index = torch.equal(found, index), found

        def read() -> Tensor:
            return grid.unpack(packed.read(), bits, inputs)

        def lattice() -> tuple[Tensor, Tensor]:
            scales = scale.read().float().reshape(-1, groups).expand(outputs, groups)
            if zero is None:
                return scales, torch.full((outputs, groups), 1 << (bits - 1))
            zeros = grid.unpack(zero.read().T.contiguous(), bits, outputs)
            return scales, zeros.T.contiguous()

        def values() -> Tensor:
            return grid.dequantize(read(), *lattice(), index)

        def codes() -> QuantizedWeight:
            return grid.pack(read(), *lattice(), size, bits)

        can_pack = in_order and grid.packable(inputs, size, *lattice(), bits)
        return StoredWeight((outputs, inputs), values, codes if can_pack else None)

    def _bits(self, packed: Part, outputs: int, inputs: int) -> int:
        """Return the number of bits of a packed weight: that of the config which fits its size."""
        wanted: list[Any] = [each.get("num_bits") for each in self._weights]
        for bits in wanted:
            if (
                isinstance(bits, int)
                and 1 < bits <= 8
                and packed.shape == (outputs, -(-inputs // (32 // bits)))
            ):
                return bits
        raise ModelFileBroken(
            packed.file,
            f"tensor {packed.name!r} of shape {packed.shape} is not ({outputs}, {inputs}) in "
            f"{' or '.join(map(str, wanted)) or 'any number of'} bits",
        )
