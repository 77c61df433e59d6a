"""Models of transformers with our paged attention, against the same models with their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.model.model_fixtures import (
    VOCAB,
    LogitsModel,
    config,
    generate,
    load_runner,
    random_tokens,
    reference_greedy,
    reference_logits,
)
from ullm.errors import ModelError, ModelFileBroken, ModelNotFound, ModelUnsupported
from ullm.model.architectures import registry
from ullm.model.architectures.transformers_model import TransformersModel
from ullm.model.loading.checkpoint import read_checkpoint

LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": VOCAB}
COMMON = {**LAYERS, "intermediate_size": 96, "max_position_embeddings": 256, "initializer_range": 0.2}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
GEMMA2_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
GPT2 = {
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 64,
    "n_positions": 256,
    "vocab_size": VOCAB,
    "initializer_range": 0.2,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-neox": ("GPTNeoX", {**COMMON, "rotary_pct": 0.5}),
    "gpt-neox-serial": ("GPTNeoX", {**COMMON, "use_parallel_residual": False, "tie_word_embeddings": True}),
    "gemma": ("Gemma", GROUPED),
    "gemma2": (
        "Gemma2",
        {
            **GROUPED,
            "sliding_window": 6,
            "layer_types": GEMMA2_LAYERS,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 40,
        },
    ),
    "gemma3": ("Gemma3Text", {**GROUPED, "sliding_window": 5, "layer_types": GEMMA2_LAYERS}),
    "phi": ("Phi", {**COMMON, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, **IDS}),
    "phi3": ("Phi3", {**COMMON, "num_key_value_heads": 2, "sliding_window": 7, **IDS}),
    "gpt2": ("GPT2", {**GPT2, **IDS}),
    "gpt2-scaled": ("GPT2", {**GPT2, **IDS, "scale_attn_by_inverse_layer_idx": True}),
    "gpt-bigcode": ("GPTBigCode", {**GPT2, **IDS, "multi_query": True}),
    "opt": (
        "OPT",
        {**LAYERS, **IDS, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 256},
    ),
    "cohere": ("Cohere", {**COMMON, **IDS, "num_key_value_heads": 2, "logit_scale": 0.3}),
    "granite": ("Granite", {**GROUPED, "logits_scaling": 2.0, "attention_multiplier": 0.4}),
    "starcoder2": ("Starcoder2", {**COMMON, **IDS, "num_key_value_heads": 2, "sliding_window": 6}),
    "olmo2": ("Olmo2", {**COMMON, **IDS, "num_key_value_heads": 2}),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4, "sliding_window": None}),
    "gpt-oss": ("GptOss", {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6}),
    "deepseek": (
        "DeepseekV3",
        {
            **COMMON,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 24,
            "num_key_value_heads": 4,
        },
    ),
}
HEADS = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


@pytest.fixture(autouse=True)
def _nothing_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the architectures are native, too."""
    monkeypatch.setattr(registry, "NATIVE", {})


def build(family: str, options: dict[str, Any]) -> Any:
    """A random model whose every parameter matters."""
    torch.manual_seed(0)
    kind = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))
    model = kind(getattr(transformers, f"{family}Config")(**options)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif family == "OPT":
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name → (folder, reference model), each built once."""
    known: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in known:
            path, model = tmp_path_factory.mktemp(name), build(*MODELS[name])
            model.save_pretrained(path)
            known[name] = path, model
        return known[name]

    return get


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str, saved: Any) -> None:
    """Prefill, chunked prefill and decodes, alone and mixed in one step."""
    path, reference = saved(name)
    ours = LogitsModel(path)
    assert isinstance(ours.model, TransformersModel)
    first, second, third = (random_tokens(count, seed) for seed, count in enumerate((23, 17, 9)))
    expected = [reference_logits(reference, tokens) for tokens in (first, second, third)]
    ours.add(0, first, [7, 3, 20, 11, 2, 9])
    ours.add(1, second, [30, 1, 8, 4, 5])
    ours.add(2, third, [40, 41, 42])
    found = ours.step((0, 0, 14))
    close(found[0], expected[0][:14])
    found = ours.step((1, 0, 5), (0, 14, 3))
    close(found[0], expected[0][14:17])
    close(found[1], expected[1][:5])
    for turn in range(4):
        found = ours.step((0, 17 + turn, 1), (1, 5 + 3 * turn, 3), (2, 2 * turn, 2))
        close(found[0], expected[0][17 + turn : 18 + turn])
        close(found[1], expected[1][5 + 3 * turn : 8 + 3 * turn])
        close(found[2], expected[2][2 * turn : 2 * turn + 2])


@pytest.mark.parametrize("name", ["gpt-neox", "gemma2", "gemma3", "opt", "gpt-bigcode"])
def test_greedy_equals_transformers(name: str, saved: Any) -> None:
    path, reference = saved(name)
    prompt = random_tokens(13, seed=1)
    expected = reference_greedy(reference, prompt, 20)
    assert generate(load_runner(path), prompt, 20) == expected
    assert generate(load_runner(path), prompt, 20, chunk=5) == expected


def test_what_the_model_says_of_itself(saved: Any) -> None:
    path, reference = saved("gemma2")
    model = LogitsModel(path).model
    shape = model.kv_shape
    assert (shape.num_layers, shape.num_query_heads, shape.num_kv_heads, shape.head_dim) == (3, 4, 2, 16)
    assert model.num_parameters() == reference.num_parameters()
    assert model.weight_bytes() == 4 * reference.num_parameters()
    assert model.dtype == torch.float32


def test_half_precision_and_dummy_weights(saved: Any) -> None:
    path, reference = saved("gpt-neox")
    ours = LogitsModel(path, dtype="bfloat16")
    ours.add(0, random_tokens(9, 1), [1, 2, 3])
    found = ours.step((0, 0, 9))[0].float()
    expected = reference_logits(reference, random_tokens(9, 1))
    assert (found - expected).norm() < 0.05 * expected.norm()
    dummy = LogitsModel(path, load_format="dummy")
    dummy.add(0, random_tokens(9, 1), [1, 2, 3])
    assert dummy.step((0, 0, 9))[0].isfinite().all()
    assert dummy.model.num_parameters() == reference.num_parameters()


def test_two_models_live_in_one_process(saved: Any) -> None:
    """The functions registered with transformers belong to no single model."""
    names = ("gemma2", "gpt2")
    ours = [LogitsModel(saved(name)[0]) for name in names]
    tokens = random_tokens(12, 2)
    for model in ours:
        model.add(0, tokens, [5, 6, 7])
    for start in (0, 6):
        for name, model in zip(names, ours, strict=True):
            expected = reference_logits(saved(name)[1], tokens)
            close(model.step((0, start, 6))[0], expected[start : start + 6])


# --- what cannot be run ------------------------------------------------------------------------

RECURRENT = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("Mamba", RECURRENT, "cannot be replaced"),
    "bloom": (
        "Bloom",
        {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        "cannot be replaced",
    ),
    "lfm2": ("Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention", "conv"]}, "type conv"),
    "minimax": (
        "MiniMax",
        {**GROUPED, "num_local_experts": 2, "layer_types": ["full_attention"] * 2 + ["linear_attention"]},
        "type linear_attention",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_paged_attention_cannot_do_is_refused(name: str) -> None:
    family, options, message = UNSUPPORTED[name]
    with pytest.raises(ModelUnsupported, match=message) as caught:
        TransformersModel(build(family, options))
    assert family in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_mixes_tokens_is_refused() -> None:
    """A change outside attention that no flag of the model tells of."""
    model = build(*MODELS["gpt-neox"])

    def shift(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + torch.roll(output, 1, dims=1)

    model.gpt_neox.layers[0].mlp.register_forward_hook(shift)
    with pytest.raises(ModelUnsupported, match="computes something else"):
        TransformersModel(model)


def test_a_model_that_ignores_positions_is_refused() -> None:
    model = build(*MODELS["gpt2"])

    def from_zero(_module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (torch.arange(inputs[0].shape[-1])[None],)

    model.transformer.wpe.register_forward_pre_hook(from_zero)
    with pytest.raises(ModelUnsupported, match="computes something else"):
        TransformersModel(model)


def test_a_model_whose_code_fails_is_refused() -> None:
    model = build(*MODELS["gpt-neox"])
    model.gpt_neox.layers[1].mlp = None
    with pytest.raises(ModelUnsupported, match="GPTNeoXForCausalLM does not run with paged attention"):
        TransformersModel(model)


def test_length_dependent_rotary_embeddings(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    family, options = MODELS["phi3"]
    options = {**options, "rope_parameters": rope, "original_max_position_embeddings": 32}
    build(family, options).save_pretrained(tmp_path)
    with pytest.raises(ModelUnsupported, match="--context-len 32"):
        LogitsModel(tmp_path)
    assert LogitsModel(tmp_path, context_len=32).model.kv_shape.num_layers == 3


def load(path: Path, **options: Any) -> TransformersModel:
    checkpoint = read_checkpoint(path, config(path, **options), torch.device("cpu"))
    return TransformersModel.load(checkpoint, config(path, **options), torch.device("cpu"))


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "never-heard-of"}, "does not know"),
        ({"model_type": "never-heard-of", "auto_map": {"AutoConfig": "a.B"}}, "--trust-remote-code"),
        ({"model_type": "vit"}, "not a causal language model"),
    ],
)
def test_unknown_architectures(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    build(*MODELS["gpt2"]).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelUnsupported, match=message):
        load(tmp_path)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    build(*MODELS["gpt2"]).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    edit_config(tmp_path, n_layer=4)
    with pytest.raises(ModelFileBroken, match=r"tensor 'transformer\.h\.3\..*' is missing"):
        load(tmp_path)
    edit_config(tmp_path, n_layer=3, n_embd=32)
    with pytest.raises(ModelFileBroken, match=r"tensor '.*' has shape \(192,\), the config says \(96,\)"):
        load(tmp_path)
    edit_config(tmp_path, n_embd=64, n_head="many")
    with pytest.raises(ModelError, match=str(tmp_path)):
        load(tmp_path)
    edit_config(tmp_path, n_head=4)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFileBroken, match="is not a complete safetensors file"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(ModelNotFound, match=r"model\.safetensors"):
        load(tmp_path)
