"""GGUF files of every architecture, made of tiny models of transformers, compute what these do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.model.gguf_models import write_gguf
from tests.model.model_fixtures import EXPERTS, GEMMA, GRANITE, HEADS, SHAPE, LogitsModel, random_tokens
from ullm.errors import ModelUnsupported
from ullm.model.loading.gguf import read_gguf_config
from ullm.model.loading.gguf_kinds import KINDS

GEMMA3 = {"rope.freq_base": 1e6, "attention.sliding_window": 6}
BASE = {"rope.freq_base": 10000.0}
USED = {"expert_count": 6, "expert_used_count": 2}
LAYERS = {"num_hidden_layers": 4, "max_position_embeddings": 128}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}, BASE),
    "mixtral": ("llama", "Mixtral", {**EXPERTS, "sliding_window": None}, {"rope.freq_base": 1e6, **USED}),
    "mistral3": ("mistral3", "Mistral", {"head_dim": 32, "sliding_window": None}, BASE),
    "qwen2": ("qwen2", "Qwen2", {}, BASE),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32}, BASE),
    "qwen2moe": (
        "qwen2moe",
        "Qwen2Moe",
        {**EXPERTS, "shared_expert_intermediate_size": 48},
        {**BASE, **USED, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 48},
    ),
    "qwen3moe": (
        "qwen3moe",
        "Qwen3Moe",
        {**EXPERTS, "head_dim": 32, "norm_topk_prob": True},
        {**BASE, **USED, "expert_feed_forward_length": 32},
    ),
    "gemma2": (
        "gemma2",
        "Gemma2",
        {**GEMMA, "layer_types": None, "query_pre_attn_scalar": 32},
        {
            **BASE,
            "attention.sliding_window": 6,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": (
        "gemma3",
        "Gemma3Text",
        {**GEMMA, "layer_types": None, "num_hidden_layers": 6, "query_pre_attn_scalar": 32},
        GEMMA3,
    ),
    "gemma3-all-windows": (
        "gemma3",
        "Gemma3Text",
        {**GEMMA, "layer_types": ["sliding_attention"] * 4, "query_pre_attn_scalar": 32},
        {**GEMMA3, "attention.sliding_window_pattern": 0},
    ),
    "granite": (
        "granite",
        "Granite",
        {**GRANITE, "attention_multiplier": 0.3},
        {
            **BASE,
            **{"attention.scale": 0.3, "embedding_scale": 6.0, "residual_scale": 0.4, "logit_scale": 3.0},
        },
    ),
    "olmo2": ("olmo2", "Olmo2", {"pad_token_id": 0}, BASE),
    "phi3": (
        "phi3",
        "Phi3",
        {"pad_token_id": 0, "sliding_window": 9, "partial_rotary_factor": 0.5},
        {**BASE, "attention.sliding_window": 9, "rope.dimension_count": 8},
    ),
    "smollm3": ("smollm3", "SmolLM3", {"pad_token_id": 0}, {"rope.freq_base": 2e6}),
}


def build(family: str, options: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{family}Config")(**(SHAPE | LAYERS | options))
    torch.manual_seed(0)
    model = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_transformers(case: str, tmp_path: Path) -> None:
    arch, family, options, metadata = CASES[case]
    reference = build(family, options)
    path, tokens = write_gguf(tmp_path / "model.gguf", arch, reference, metadata), random_tokens(60, seed=1)
    ours = LogitsModel(path)
    ours.add(0, tokens, list(range(15)))
    found = torch.cat([ours.step((0, 0, 33))[0], ours.step((0, 33, 26))[0], ours.step((0, 59, 1))[0]])
    expected = reference(torch.tensor([tokens]), use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_every_architecture_has_a_case() -> None:
    assert {arch for arch, *_ in CASES.values()} == KINDS.keys()


@pytest.mark.parametrize(
    ("case", "metadata", "reason"),
    [
        ("qwen3moe", {"expert_gating_func": 2}, "not chosen by a softmax"),
        ("qwen3moe", {"expert_weights_scale": 2.5}, "expert_weights_scale is 2.5"),
        ("olmo2", {"attention.sliding_window": 16}, "sliding_window is 16"),
        ("mistral3", {"attention.temperature_scale": 0.1}, r"attention.temperature_scale is 0\.1"),
        ("qwen2", {"expert_count": 4}, "with experts"),
        ("llama", {"embedding_scale": 12.0}, r"embedding_scale is 12\.0"),
    ],
)
def test_what_would_be_another_model_is_refused(
    case: str, metadata: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    arch, family, options, usual = CASES[case]
    path = write_gguf(tmp_path / "model.gguf", arch, build(family, options), {**usual, **metadata})
    with pytest.raises(ModelUnsupported, match=reason) as caught:
        read_gguf_config(path)
    assert "\n" not in str(caught.value)
