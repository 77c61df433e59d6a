"""AWQ (arXiv:2306.00978) in AutoAWQ's format ``gemm``.

``qweight [in, out / 8]`` and ``qzeros [groups, out / 8]`` int32, packed along the outputs in an order of its
own; ``scales [groups, out]``. What AWQ did to the inputs' scales is in the norms before the layers.
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

PARTS = {name: name for name in ("qweight", "qzeros", "scales")}
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output j of eight is in the four bits of this number of an int32, counted from the lowest ones."""


class Awq:
    """See the module."""

    name = "awq"

    def __init__(self, config: FoundConfig) -> None:
        values = config.values
        bits = values.get("bits", values.get("w_bit"))
        if bits != 4:
            raise config.unsupported(f"AWQ with {bits} bits")
        version = str(values.get("version") or "gemm").lower()
        if version != "gemm":
            raise config.unsupported(f"AWQ in the format {version!r}")
        self._size = config.number("group_size" if "group_size" in values else "q_group_size", 128)

    def split(self, name: str, stored: str) -> tuple[str, str] | None:
        """See `Format.split`."""
        return split_last(name, PARTS)

    def weight(self, name: str, parts: Mapping[str, Part]) -> StoredWeight:
        """See `Format.weight`."""
        qweight, scales = require(name, parts, "qweight", "scales")
        inputs, outputs = qweight.shape[0], qweight.shape[-1] * 8
        size = inputs if self._size < 1 else self._size
        groups = -(-inputs // size)
        check_shape(scales, (groups, outputs))
        qzeros = parts.get("qzeros")
        if qzeros is not None:
            check_shape(qzeros, (groups, outputs // 8))

        def lattice() -> tuple[Tensor, Tensor]:
            zeros = torch.full((outputs, groups), 8) if qzeros is None else _unpack(qzeros.read())
            return scales.read().float().T.contiguous(), zeros

        def values() -> Tensor:
            return grid.dequantize(_unpack(qweight.read()), *lattice(), torch.arange(inputs) // size)

        def codes() -> QuantizedWeight:
            return grid.pack(_unpack(qweight.read()), *lattice(), size, 4)

        can_pack = grid.packable(inputs, size, *lattice(), 4)
        return StoredWeight((outputs, inputs), values, codes if can_pack else None)


def _unpack(packed: Tensor) -> Tensor:
    """Return ``[rows, out / 8]`` int32 as codes ``[out, rows]``."""
    codes = grid.unpack(packed, 4, packed.shape[1] * 8).view(packed.shape[0], -1, 8)
    return codes[:, :, list(ORDER)].reshape(packed.shape[0], -1).T.contiguous()
