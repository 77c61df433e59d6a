"""SmolLM3."""

from __future__ import annotations

import dataclasses
from typing import Any

from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.decoder_config import DecoderConfig, layer_windows
from ullm.model.architectures.llama import LlamaForCausalLM
from ullm.model.layers.rope import read_rope


class SmolLM3ForCausalLM(Decoder):
    """SmolLM3: Llama without a rotary embedding in every fourth layer (NoPE, arXiv:2501.18795)."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``SmolLM3Config``."""
        every, layers = hf.get("no_rope_layer_interval") or 4, hf["num_hidden_layers"]
        rotated = hf.get("no_rope_layers") or [(layer + 1) % every != 0 for layer in range(layers)]
        windowed = bool(hf.get("use_sliding_window")) and hf.get("sliding_window") is not None
        kinds = ["sliding_attention" if windowed and not has else "full_attention" for has in rotated]
        windows = layer_windows(hf, kinds[:layers], None)
        defaults = {
            "num_key_value_heads": hf.get("num_key_value_heads", 4),
            "tie_word_embeddings": hf.get("tie_word_embeddings", True),
        }
        return dataclasses.replace(
            LlamaForCausalLM.read_config(hf | defaults, context_len),
            rope=read_rope(hf, default_theta=2_000_000.0),
            no_rope=tuple(not has for has in rotated[:layers]),
            sliding_windows=windows,  # kinds of layers that a config names count whatever its flag says
        )
