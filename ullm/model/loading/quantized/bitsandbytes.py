"""bitsandbytes' four bits (QLoRA, arXiv:2305.14314): NF4 or FP4, its scales perhaps quantized as well.

``weight`` uint8, two codes per byte, the higher four bits first; ``weight.quant_map [16]``, the number of
each code; ``weight.absmax``, a scale per block of the flattened weight; and JSON with the weight's shape and
the block's size in ``weight.quant_state.bitsandbytes__nf4``. Double quantization: ``weight.nested_absmax``
and ``weight.nested_quant_map`` make the scales, which ``nested_offset`` is added to.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from ullm.errors import ModelFileBroken
from ullm.model.loading.quantized.interface import FoundConfig, Part, StoredWeight, check_shape, require

PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE = "quant_state.bitsandbytes__"


class QuantState(msgspec.Struct, kw_only=True):
    """What bitsandbytes says of a weight; other keys name dtypes, which do not matter here."""

    shape: list[int]
    blocksize: int
    quant_type: str
    nested_blocksize: int = 0
    nested_offset: float = 0.0


class Bitsandbytes4:
    """See the module."""

    name = "bitsandbytes"

    def __init__(self, config: FoundConfig) -> None:
        storage = config.values.get("bnb_4bit_quant_storage") or "uint8"
        if storage != "uint8":
            raise config.unsupported(f"bitsandbytes with its codes in {storage!s:.20}")

    def split(self, name: str, stored: str) -> tuple[str, str] | None:
        """See `Format.split`."""
        if name.endswith(".weight"):
            return (name, "weight") if stored == "U8" else None
        weight, _, last = name.partition(".weight.")
        if last in PARTS:
            return f"{weight}.weight", last
        return (f"{weight}.weight", "state") if last.startswith(STATE) else None

    def weight(self, name: str, parts: Mapping[str, Part]) -> StoredWeight:
        """See `Format.weight`."""
        weight, absmax, table, state_part = require(name, parts, "weight", "absmax", "quant_map", "state")
        try:
            state = msgspec.json.decode(bytes(state_part.read().tolist()), type=QuantState)
        except (msgspec.DecodeError, ValueError) as error:
            raise ModelFileBroken(state_part.file, f"tensor {state_part.name!r}: {error}") from None
        count = torch.Size(state.shape).numel()
        check_shape(table, (16,))
        if state.blocksize < 1 or count < 1 or torch.Size(weight.shape).numel() != -(-count // 2):
            raise ModelFileBroken(
                weight.file, f"tensor {name!r} of shape {weight.shape} is not {state.shape}"
            )
        check_shape(absmax, (-(-count // state.blocksize),))
        if "nested_quant_map" in parts:
            check_shape(parts["nested_quant_map"], (256,))
        nested = require(name, parts, "nested_absmax", "nested_quant_map") if "nested_absmax" in parts else []

        def scales() -> Tensor:
            found = absmax.read()
            if not nested:
                return found.float()
            outer, inner = (each.read().float() for each in nested)
            outer = outer.repeat_interleave(state.nested_blocksize)[: len(found)]
            return inner[found.long()] * outer + state.nested_offset

        def values() -> Tensor:
            packed = weight.read().flatten()
            codes = torch.stack((packed >> 4, packed & 15), -1).flatten()[:count]
            factors = scales().repeat_interleave(state.blocksize)[:count]
            return (table.read().float()[codes.long()] * factors).reshape(state.shape)

        return StoredWeight(tuple(state.shape), values)
