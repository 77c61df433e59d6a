"""Mixtral."""

from __future__ import annotations

import dataclasses
from typing import Any

from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.decoder_config import DecoderConfig, ExpertsConfig
from ullm.model.architectures.llama import LlamaForCausalLM
from ullm.model.layers.rope import read_rope


class MixtralForCausalLM(Decoder):
    """Mixtral (arXiv:2401.04088): Mistral with experts in every layer."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``MixtralConfig``."""
        layers = hf["num_hidden_layers"]
        defaults = {
            "num_key_value_heads": hf.get("num_key_value_heads", 8),
            "rms_norm_eps": hf.get("rms_norm_eps", 1e-5),
            **{"attention_bias": False, "mlp_bias": False},
        }
        return dataclasses.replace(
            LlamaForCausalLM.read_config(hf | defaults, context_len),
            rope=read_rope(hf, default_theta=1_000_000.0),
            sliding_windows=(hf.get("sliding_window"),) * layers,
            experts=ExpertsConfig(
                count=hf.get("num_local_experts") or hf.get("num_experts") or 8,
                chosen=hf.get("num_experts_per_tok", 2),
                size=hf["intermediate_size"],
                layers=(True,) * layers,
            ),
        )
