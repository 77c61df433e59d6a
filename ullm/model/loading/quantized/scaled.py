"""Weights in FP8 or int8 beside their scales, under the layer's own name: ``weight`` and a scale.

* FP8 of DeepSeek and Qwen: ``weight_scale_inv [out / 128, in / 128]``, a factor, whatever its name.
* FP8 of ModelOpt, vLLM and compressed-tensors: ``weight_scale``, one or one per output.
* int8 of compressed-tensors: the same, or one per group; ``weight_zero_point`` if it is not symmetric.
* int8 of bitsandbytes (arXiv:2208.07339): ``SCB [out]``, the largest weight of each output, which is 127.

The scales of activations are of no use here: activations stay floats.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ullm.errors import ModelFileBroken, ModelUnsupported
from ullm.model.layers.quantization import ZERO, QuantizedWeight
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

CODES = frozenset({"F8_E4M3", "F8_E5M2", "I8"})
"""Dtypes, as safetensors names them, of weights that have a scale."""
PARTS = {
    **{name: name for name in ("weight_scale", "weight_scale_inv", "weight_zero_point", "SCB")},
    **dict.fromkeys(("input_scale", "input_zero_point", "output_scale", "activation_scale"), ""),
    **dict.fromkeys(("k_scale", "v_scale", "q_scale", "prob_scale", "weight_format"), ""),
}
"""Last part of a tensor's name → what it is; empty: scales of activations and of the KV cache."""


class Scaled:
    """See the module.

    Args:
        name: what users call the format.
        config: says the blocks, if a scale is for a block.
    """

    def __init__(self, name: str, config: FoundConfig) -> None:
        self.name = name
        block = config.values.get("weight_block_size")
        if block is not None and (
            not isinstance(block, list)
            or len(block) != 2
            or not all(type(each) is int and each > 0 for each in block)
        ):
            raise ModelFileBroken(config.file, f"'weight_block_size' must be two sizes, is {block!s:.40}")
        self._block = block

    def split(self, name: str, stored: str) -> tuple[str, str] | None:
        """See `Format.split`."""
        if name.endswith(".weight"):
            return (name, "weight") if stored in CODES else None
        return split_last(name, PARTS)

    def weight(self, name: str, parts: Mapping[str, Part]) -> StoredWeight:
        """See `Format.weight`."""
        (weight,) = require(name, parts, "weight")
        found = [key for key in ("weight_scale", "weight_scale_inv", "SCB") if key in parts]
        if not found or len(weight.shape) != 2:
            raise ModelUnsupported(
                f"{weight.file}: tensor {name!r} is stored in {weight.stored} and has no scale; {REMEDY}"
            )
        scale, zero = parts[found[0]], parts.get("weight_zero_point")
        outputs, inputs = weight.shape
        rows, columns = _blocks(scale, weight.shape, self._block)
        factor = 1 / 127 if found[0] == "SCB" else 1.0
        if zero is not None:
            check_shape(zero, scale.shape)

        def expand(part: Part) -> Tensor:
            """Return a value per output and group of inputs."""
            whole = part.read().float().reshape(-(-outputs // rows), -(-inputs // columns))
            return whole.repeat_interleave(rows, 0)[:outputs]

        def values() -> Tensor:
            codes = weight.read().float()
            if zero is not None:
                codes = codes - grid.spread(expand(zero), columns, inputs)
            return codes * grid.spread(expand(scale) * factor, columns, inputs)

        def lattice() -> tuple[Tensor, Tensor]:
            scales = expand(scale) * factor
            return scales, torch.full_like(scales, ZERO) if zero is None else expand(zero) + ZERO

        def codes() -> QuantizedWeight:
            return grid.pack(weight.read().int() + ZERO, *lattice(), columns, 8)

        can_pack = weight.stored == "I8" and grid.packable(inputs, columns, *lattice(), 8)
        return StoredWeight(weight.shape, values, codes if can_pack else None)


def _blocks(scale: Part, shape: tuple[int, ...], block: list[int] | None) -> tuple[int, int]:
    """Return how many outputs and inputs share a scale.

    Raises:
        ModelFileBroken: there are not as many scales as blocks.
    """
    outputs, inputs = shape
    count = torch.Size(scale.shape).numel()
    if count == 1:
        return outputs, inputs
    if block is not None and scale.shape == (-(-outputs // block[0]), -(-inputs // block[1])):
        return block[0], block[1]
    if scale.shape in ((outputs,), (outputs, 1)):
        return 1, inputs
    if len(scale.shape) == 2 and scale.shape[0] == outputs and inputs % scale.shape[1] == 0:
        return 1, inputs // scale.shape[1]
    raise ModelFileBroken(
        scale.file, f"tensor {scale.name!r} of shape {scale.shape} has no scale for each part of {shape}"
    )
