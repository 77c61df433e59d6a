"""Qwen's mixtures of experts."""

from __future__ import annotations

import dataclasses
from typing import Any

from ullm.model.architectures.decoder import Decoder
from ullm.model.architectures.decoder_config import DecoderConfig, ExpertsConfig, layer_windows
from ullm.model.architectures.qwen2 import Qwen2ForCausalLM
from ullm.model.architectures.qwen3 import Qwen3ForCausalLM


class Qwen2MoeForCausalLM(Decoder):
    """Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, one of which all tokens have."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``Qwen2MoeConfig``."""
        windowed, most = bool(hf.get("use_sliding_window")), hf.get("max_window_layers", 28)
        kinds = [
            "sliding_attention" if windowed and layer % 2 == 0 and layer < most else "full_attention"
            for layer in range(hf["num_hidden_layers"])
        ]
        windows = layer_windows(hf, kinds, 4096)
        return dataclasses.replace(
            Qwen2ForCausalLM.read_config(hf, context_len),
            sliding_windows=windows if windowed else (None,) * len(windows),
            qkv_bias=hf.get("qkv_bias", True),
            experts=_experts(hf, hf.get("moe_intermediate_size", 1408), 4, 60, _shared(hf)),
        )


class Qwen3MoeForCausalLM(Decoder):
    """Qwen3's mixtures of experts (arXiv:2505.09388)."""

    @staticmethod
    def read_config(hf: dict[str, Any], context_len: int) -> DecoderConfig:
        """See `Decoder.read_config`; defaults are those of transformers' ``Qwen3MoeConfig``."""
        windowed = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
        return dataclasses.replace(
            Qwen3ForCausalLM.read_config(hf, context_len),
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            sliding_windows=(windowed,) * hf["num_hidden_layers"],
            experts=_experts(hf, hf.get("moe_intermediate_size", 768), 8, 128, 0),
        )


def _shared(hf: dict[str, Any]) -> int:
    size: int = hf.get("shared_expert_intermediate_size", 5632)
    return size


def _experts(hf: dict[str, Any], size: int, chosen: int, count: int, shared: int) -> ExpertsConfig:
    """Return the experts; every ``decoder_sparse_step``-th layer has them, but for ``mlp_only_layers``."""
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    count = hf.get("num_local_experts") or hf.get("num_experts") or count
    return ExpertsConfig(
        count=count,
        chosen=hf.get("num_experts_per_tok", chosen),
        size=size,
        shared_size=shared,
        normalize=hf.get("norm_topk_prob", False),
        layers=tuple(
            layer not in dense and count > 0 and (layer + 1) % step == 0
            for layer in range(hf["num_hidden_layers"])
        ),
    )
