"""GPTQ (arXiv:2210.17323), as AutoGPTQ and GPTQModel save it.

``qweight [in * bits / 32, out]`` int32, packed along the inputs; ``qzeros [groups, out * bits / 32]``, packed
along the outputs, which hold ``zero - 1`` in the first version of the format; ``scales [groups, out]``;
``g_idx [in]``, the group of each input, which is not in order if ``desc_act`` was used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ullm.model.layers.quantization import QuantizedWeight
from ullm.model.loading.quantized import grid
from ullm.model.loading.quantized.interface import (
    FoundConfig,
    Part,
    StoredWeight,
    check_shape,
    require,
    split_last,
)

PARTS = {name: name for name in ("qweight", "qzeros", "scales", "g_idx")}
SIMPLE_BITS = (2, 4, 8)
"""Numbers of bits that divide 32."""


class Gptq:
    """See the module."""

    name = "gptq"

    def __init__(self, config: FoundConfig) -> None:
        self._bits = config.number("bits")
        if self._bits not in SIMPLE_BITS:
            raise config.unsupported(f"GPTQ with {self._bits} bits")
        self._size = config.number("group_size", -1)
        version = config.values.get("checkpoint_format") or "gptq"
        if version not in ("gptq", "gptq_v2") or config.values.get("is_marlin_format"):
            raise config.unsupported(f"GPTQ in the format {version!r}, or packed for Marlin,")
        dynamic = config.values.get("dynamic") or {}
        if any(not str(key).startswith("-:") for key in dynamic):
            raise config.unsupported("GPTQ with 'dynamic' settings per layer")
        self._offset = 1 if version == "gptq" else 0

    def split(self, name: str, stored: str) -> tuple[str, str] | None:
        """See `Format.split`."""
        return split_last(name, PARTS)

    def weight(self, name: str, parts: Mapping[str, Part]) -> StoredWeight:
        """See `Format.weight`."""
        qweight, qzeros, scales = require(name, parts, "qweight", "qzeros", "scales")
        bits, per = self._bits, 32 // self._bits
        inputs, outputs = qweight.shape[0] * per, qweight.shape[-1]
        size = inputs if self._size < 1 else self._size
        groups = -(-inputs // size)
        check_shape(scales, (groups, outputs))
        check_shape(qzeros, (groups, -(-outputs // per)))
        order = torch.arange(inputs) // size
        index = order
        if "g_idx" in parts:
            check_shape(parts["g_idx"], (inputs,))
            index = grid.checked_index(parts["g_idx"], groups)

        def read() -> Tensor:
            return grid.unpack(qweight.read().T.contiguous(), bits, inputs)

        def lattice() -> tuple[Tensor, Tensor]:
            zeros = grid.unpack(qzeros.read(), bits, outputs).int()
            zeros = (zeros + self._offset) & ((1 << bits) - 1)
            return scales.read().float().T.contiguous(), zeros.T.contiguous()

        def values() -> Tensor:
            return grid.dequantize(read(), *lattice(), index)

        def codes() -> QuantizedWeight:
            return grid.pack(read(), *lattice(), size, bits)

        can_pack = torch.equal(index, order) and grid.packable(inputs, size, *lattice(), bits)
        return StoredWeight((outputs, inputs), values, codes if can_pack else None)
