"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from typing import Any

from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.decoder_config import DecoderConfig, read_activation
from ullm.model.layers.rope import read_rope


class Qwen2ForCausalLM(Decoder):
    """Qwen2 (arXiv:2407.10671): biases on queries, keys and values."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``Qwen2Config``."""
        heads = hf["num_attention_heads"]
        return DecoderConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            context_len=context_len,
            rope=read_rope(hf, default_theta=10000.0),
            sliding_windows=qwen_windows(hf),
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            qkv_bias=True,
            activation=read_activation(hf),
        )


def qwen_windows(hf: dict[str, Any]) -> tuple[int | None, ...]:
    """Return the sliding window of each layer. It is off by default; otherwise ``layer_types`` or the higher
    layers have it."""
    layers = hf["num_hidden_layers"]
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    first = hf.get("max_window_layers", 28)
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    kinds = hf.get("layer_types") or default
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
