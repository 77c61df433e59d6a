"""IBM's Granite 3 and 4, dense."""

from __future__ import annotations

import dataclasses
from typing import Any

from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.decoder_config import DecoderConfig
from ullm.model.architectures.llama import LlamaForCausalLM


class GraniteForCausalLM(Decoder):
    """Granite: Llama with four factors (arXiv:2408.13359)."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``GraniteConfig``."""
        scaling = hf.get("logits_scaling", 1.0)
        if scaling == 0:
            raise ValueError("logits_scaling is 0, which logits cannot be divided by")
        return dataclasses.replace(
            LlamaForCausalLM.read_config(hf, context_len),
            embedding_scale=hf.get("embedding_multiplier", 1.0),
            residual_scale=hf.get("residual_multiplier", 1.0),
            attention_scale=hf.get("attention_multiplier", 1.0),
            logit_scale=1 / scaling,
        )
