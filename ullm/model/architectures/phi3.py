"""Microsoft's Phi-3, Phi-3.5 and Phi-4, text only."""

from __future__ import annotations

import dataclasses
from typing import Any

from ullm.errors import ModelUnsupported
from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.decoder_config import DecoderConfig
from ullm.model.architectures.llama import LlamaForCausalLM
from ullm.model.layers.rope import read_rope


class Phi3ForCausalLM(Decoder):
    """Phi-3 (arXiv:2404.14219): projections in one tensor, and LongRoPE within the original context."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``Phi3Config``."""
        original = {"original_max_position_embeddings": hf.get("original_max_position_embeddings") or 4096}
        given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
        if (given.get("rope_type") or given.get("type")) in ("su", "yarn"):  # older names, as in transformers
            given["rope_type"] = "longrope"
        rope = read_rope(hf | {**original, "rope_scaling": given}, 10000.0, partial=True)
        if rope["rope_type"] not in ("default", "longrope"):
            raise ModelUnsupported(f"rope scaling of type {rope['rope_type']!r} is not one of Phi-3's")
        if rope["rope_type"] == "longrope" and context_len > rope["original_max_position_embeddings"]:
            raise ModelUnsupported("LongRoPE beyond the original context depends on each text's length")
        plain = {"rope_parameters": None, "rope_scaling": None, "partial_rotary_factor": 1.0}
        defaults = {"rms_norm_eps": hf.get("rms_norm_eps", 1e-5), "attention_bias": False, "mlp_bias": False}
        return dataclasses.replace(
            LlamaForCausalLM.read_config(hf | plain | defaults, context_len),
            rope=rope,
            sliding_windows=(hf.get("sliding_window"),) * hf["num_hidden_layers"],
            fused=True,
        )
