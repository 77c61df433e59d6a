"""Gemma 2 and 3, text only."""

from __future__ import annotations

import dataclasses
from typing import Any

from ullm.errors import ModelUnsupported
from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.decoder_config import DecoderConfig, layer_windows, read_activation
from ullm.model.layers.rope import read_layer_ropes, read_rope


class Gemma2ForCausalLM(Decoder):
    """Gemma 2 (arXiv:2408.00118): norms on both sides, soft caps, and a window in every other layer."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``Gemma2Config``."""
        layers = hf["num_hidden_layers"]
        kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
        return dataclasses.replace(
            _gemma(hf, context_len, kinds),
            rope=read_rope(hf, default_theta=10000.0),
            attention_softcap=hf.get("attn_logit_softcapping", 50.0),
            logit_softcap=hf.get("final_logit_softcapping", 30.0),
        )


class Gemma3ForCausalLM(Decoder):
    """Gemma 3 (arXiv:2503.19786): norms on queries and keys, and in five layers of six a window with a rotary
    embedding of its own."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``Gemma3TextConfig``."""
        every = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
        layers = range(1, hf["num_hidden_layers"] + 1)
        kinds = ["sliding_attention" if layer % every else "full_attention" for layer in layers]
        rope, local_rope = read_layer_ropes(hf, default_theta=1_000_000.0, local_theta=10_000.0)
        return dataclasses.replace(
            _gemma(hf, context_len, kinds),
            rope=rope,
            local_rope=local_rope,
            qk_norm=True,
            logit_softcap=hf.get("final_logit_softcapping"),
        )


def _gemma(hf: dict[str, Any], context_len: int, kinds: list[str]) -> DecoderConfig:
    if hf.get("use_bidirectional_attention"):
        raise ModelUnsupported("use_bidirectional_attention makes no causal language model")
    bias = hf.get("attention_bias", False)
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads") or 4,
        head_dim=hf.get("head_dim") or 256,
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        context_len=context_len,
        rope={},
        sliding_windows=layer_windows(hf, kinds, 4096),
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
        qkv_bias=bias,
        output_bias=bias,
        norms="around",
        norm_offset=1.0,
        activation=read_activation(hf, "hidden_activation", "gelu_pytorch_tanh"),
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=hf["hidden_size"] ** 0.5,
    )
