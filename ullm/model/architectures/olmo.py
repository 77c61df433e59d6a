"""OLMo 2 and 3."""

from __future__ import annotations

import dataclasses
from typing import Any

from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.decoder_config import DecoderConfig, layer_windows
from ullm.model.architectures.llama import LlamaForCausalLM
from ullm.model.layers.rope import read_layer_ropes


class Olmo2ForCausalLM(Decoder):
    """OLMo 2 (arXiv:2501.00656): norms of what attention and MLP return, and of queries and keys."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``Olmo2Config``."""
        eps = hf.get("rms_norm_eps", 1e-5)
        return dataclasses.replace(
            LlamaForCausalLM.read_config(hf | {"rms_norm_eps": eps, "mlp_bias": False}, context_len),
            norms="after",
            qk_norm=True,
            norm_all_heads=True,
        )


class Olmo3ForCausalLM(Decoder):
    """OLMo 3: a sliding window in three layers of four, whose rotary embedding is not scaled."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``Olmo3Config``."""
        layers = range(1, hf["num_hidden_layers"] + 1)
        kinds = ["sliding_attention" if layer % 4 else "full_attention" for layer in layers]
        theta = hf.get("rope_theta", 10000.0)
        rope, local_rope = read_layer_ropes(hf, default_theta=theta, local_theta=theta)
        plain = hf | {"rope_parameters": None, "rope_scaling": None}
        return dataclasses.replace(
            Olmo2ForCausalLM.read_config(plain, context_len),
            sliding_windows=layer_windows(hf, kinds, 4096),
            rope=rope,
            local_rope=local_rope,
        )
