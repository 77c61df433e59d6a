"""The architectures of GGUF files: what their metadata and tensors are in a Hugging Face checkpoint.

Names and metadata keys are llama.cpp's (gguf-py/gguf/constants.py), and so is what its convert_hf_to_gguf.py
does to the weights: it reorders the rows of some query and key projections, and adds 1 to Gemma's norms. What
it does not write is a constant in llama.cpp's src/llama-model.cpp, and here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ullm.errors import ModelUnsupported
from ullm.model.loading.gguf_file import GgufFile

Config = dict[str, Any]
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
"""Tensors with LongRoPE's divisors of the rotary frequencies."""
EXPERT_KEYS = frozenset(
    {
        *("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_gating_func"),
        *("expert_shared_feed_forward_length", "expert_weights_norm", "interleave_moe_layer_step"),
    }
)
SOFTMAX_GATING = 1
"""Value of ``expert_gating_func`` for a softmax over the experts' scores."""
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
"""Names with ``{}`` are of tensors that have all experts, one after the other."""


@dataclass(frozen=True)
class GgufKind:
    """One architecture.

    Args:
        architecture, model_type: as a config.json names it.
        permuted: rows of query and key projections are in llama.cpp's order, rotary pairs side by side.
        norm_offset: what was added to the weights of norms.
        names: of tensors, beyond and instead of the usual ones.
        reads: metadata keys that ``config`` acts on.
        config: entries of the config.json from the metadata, given the usual ones.
    """

    architecture: str
    model_type: str
    permuted: bool = False
    norm_offset: float = 0.0
    names: Mapping[str, str] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    config: Callable[[GgufFile, str, Config], Config] = lambda *_: {}


def _gemma(file: GgufFile, arch: str, config: Config) -> Config:
    """Read what Gemma 2 and 3 share. The largest of each scales scores by another size, as in llama.cpp."""
    largest = {"gemma2": 46, "gemma3": 62}[arch]
    heads = config["num_attention_heads"]
    whole = config["num_hidden_layers"] == largest
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if whole else config["head_dim"],
        "sliding_window": file.number(f"{arch}.attention.sliding_window", 4096 if arch == "gemma2" else 1024),
        "final_logit_softcapping": file.metadata.get(f"{arch}.final_logit_softcapping") or None,
    }


def _gemma2(file: GgufFile, arch: str, config: Config) -> Config:
    caps = {"attn_logit_softcapping": file.metadata.get(f"{arch}.attn_logit_softcapping") or None}
    return {**_gemma(file, arch, config), **caps}


def _gemma3(file: GgufFile, arch: str, config: Config) -> Config:
    pattern = file.metadata.get(f"{arch}.attention.sliding_window_pattern", 6)
    if pattern == 0:  # as llama.cpp reads it
        pattern = [True] * config["num_hidden_layers"]
    if isinstance(pattern, list):
        kinds = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
        layers: Config = {"layer_types": kinds}
    else:
        layers = {"sliding_window_pattern": pattern}
    local = {"rope_local_base_freq": float(file.number(f"{arch}.rope.freq_base_swa", 10000.0))}
    return {**_gemma(file, arch, config), **layers, **local}


def _granite(file: GgufFile, arch: str, config: Config) -> Config:
    return {
        "attention_multiplier": file.number(f"{arch}.attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": file.number(f"{arch}.embedding_scale", 1.0),
        "residual_multiplier": file.number(f"{arch}.residual_scale", 1.0),
        "logits_scaling": file.number(f"{arch}.logit_scale", 1.0),
    }


def _phi3(file: GgufFile, arch: str, config: Config) -> Config:
    rotated = file.number(f"{arch}.rope.dimension_count", config["head_dim"])
    limit = config["max_position_embeddings"]
    given: Config = {
        "partial_rotary_factor": rotated / config["head_dim"],
        "sliding_window": file.metadata.get(f"{arch}.attention.sliding_window") or None,
        "original_max_position_embeddings": file.metadata.get(
            f"{arch}.rope.scaling.original_context_length", limit
        ),
    }
    if SHORT_FACTORS in file.tensors and LONG_FACTORS in file.tensors:
        given["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": file.values(SHORT_FACTORS).tolist(),
            "long_factor": file.values(LONG_FACTORS).tolist(),
        }
        if (factor := file.metadata.get(f"{arch}.rope.scaling.attn_factor")) is not None:
            given["rope_scaling"]["attention_factor"] = factor
    return given


def _experts(file: GgufFile, arch: str, config: Config) -> Config:
    count = file.number(f"{arch}.expert_count")
    if file.metadata.get(f"{arch}.expert_gating_func", SOFTMAX_GATING) != SOFTMAX_GATING:
        raise ModelUnsupported(
            f"{file.path}: its experts are not chosen by a softmax, which is not supported"
        )
    layers = range(config["num_hidden_layers"])
    size = file.metadata.get(f"{arch}.expert_feed_forward_length") or _expert_size(file)
    return {
        "num_local_experts": count,
        "num_experts_per_tok": file.number(f"{arch}.expert_used_count"),
        "moe_intermediate_size": size,
        "shared_expert_intermediate_size": _shared_size(file, arch),
        "norm_topk_prob": file.metadata.get(f"{arch}.expert_weights_norm", arch != "qwen2moe"),
        "mlp_only_layers": [
            layer for layer in layers if f"blk.{layer}.ffn_gate_inp.weight" not in file.tensors
        ],
    }


def _expert_size(file: GgufFile) -> int:
    """Return the number of hidden units of an expert, from a matrix ``[experts, hidden units, inputs]``."""
    shapes = (entry.shape for name, entry in file.tensors.items() if name.endswith("ffn_up_exps.weight"))
    shape = next(shapes, ())
    if len(shape) != 3:
        raise file.broken("it has experts in its metadata, and none among its tensors")
    return shape[1]


def _shared_size(file: GgufFile, arch: str) -> int:
    shapes = (entry.shape for name, entry in file.tensors.items() if name.endswith("ffn_up_shexp.weight"))
    size: int = file.metadata.get(f"{arch}.expert_shared_feed_forward_length") or next(shapes, (0,))[0]
    return size


_PHI3 = GgufKind(
    "Phi3ForCausalLM",
    "phi3",
    names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    reads=frozenset({"attention.sliding_window", "rope.dimension_count", "rope.scaling.attn_factor"}),
    config=_phi3,
)
MIXTRAL = GgufKind(
    "MixtralForCausalLM", "mixtral", permuted=True, names=EXPERTS, reads=EXPERT_KEYS, config=_experts
)
"""Llama with experts, which has no name of its own."""
_GEMMA_KEYS = frozenset({"attention.sliding_window", "final_logit_softcapping"})
KINDS: dict[str, GgufKind] = {
    "llama": GgufKind("LlamaForCausalLM", "llama", permuted=True),
    "mistral3": GgufKind("MistralForCausalLM", "mistral", permuted=True),
    "qwen2": GgufKind("Qwen2ForCausalLM", "qwen2"),
    "qwen3": GgufKind("Qwen3ForCausalLM", "qwen3"),
    "qwen2moe": GgufKind(
        "Qwen2MoeForCausalLM", "qwen2_moe", names=EXPERTS, reads=EXPERT_KEYS, config=_experts
    ),
    "qwen3moe": GgufKind(
        "Qwen3MoeForCausalLM", "qwen3_moe", names=EXPERTS, reads=EXPERT_KEYS, config=_experts
    ),
    "gemma2": GgufKind(
        "Gemma2ForCausalLM",
        "gemma2",
        norm_offset=1.0,
        names=SANDWICH,
        reads=_GEMMA_KEYS | {"attn_logit_softcapping"},
        config=_gemma2,
    ),
    "gemma3": GgufKind(
        "Gemma3ForCausalLM",
        "gemma3_text",
        norm_offset=1.0,
        names=SANDWICH,
        reads=_GEMMA_KEYS | {"attention.sliding_window_pattern", "rope.freq_base_swa"},
        config=_gemma3,
    ),
    "granite": GgufKind(
        "GraniteForCausalLM",
        "granite",
        permuted=True,
        reads=frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"}),
        config=_granite,
    ),
    "olmo2": GgufKind(
        "Olmo2ForCausalLM",
        "olmo2",
        names={
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    "phi3": _PHI3,
    "smollm3": GgufKind("SmolLM3ForCausalLM", "smollm3", permuted=True),
}
"""``general.architecture`` → what it is."""
