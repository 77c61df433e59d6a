"""Llama and models of the same architecture: SmolLM2, TinyLlama, Yi, Mistral."""

from __future__ import annotations

from typing import Any

from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.decoder_config import DecoderConfig, read_activation
from ullm.model.layers.rope import read_rope


class LlamaForCausalLM(Decoder):
    """Llama 1 to 3 (arXiv:2302.13971, arXiv:2407.21783)."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``LlamaConfig``."""
        return _llama(hf, context_len, bias=hf.get("attention_bias", False), window=None)


class MistralForCausalLM(Decoder):
    """Mistral 7B (arXiv:2310.06825): Llama with a sliding window."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``MistralConfig``."""
        kv_heads = {"num_key_value_heads": hf.get("num_key_value_heads", 8)}
        return _llama(hf | kv_heads, context_len, bias=False, window=hf.get("sliding_window", 4096))


def _llama(hf: dict[str, Any], context_len: int, *, bias: bool, window: int | None) -> DecoderConfig:
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
        sliding_windows=(window,) * hf["num_hidden_layers"],
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        activation=read_activation(hf),
    )
