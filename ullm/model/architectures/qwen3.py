"""Dense Qwen3 models."""

from __future__ import annotations

import dataclasses
from typing import Any

from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.decoder_config import DecoderConfig
from ullm.model.architectures.qwen2 import Qwen2ForCausalLM


class Qwen3ForCausalLM(Decoder):
    """Qwen3 (arXiv:2505.09388): norms on each head's queries and keys instead of Qwen2's biases."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``Qwen3Config``."""
        bias = hf.get("attention_bias", False)
        return dataclasses.replace(
            Qwen2ForCausalLM.read_config(hf, context_len),
            head_dim=hf.get("head_dim") or 128,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=True,
        )
