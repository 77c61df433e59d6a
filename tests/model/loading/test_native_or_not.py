"""Configs that the native classes do not take: through transformers' code, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.model.model_fixtures import LogitsModel, random_tokens, reference_logits, save_tiny
from ullm.errors import ModelError, ModelFileBroken, ModelUnsupported
from ullm.model.layers.parallel import ParallelContext

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "factor": 2.0,
    "original_max_position_embeddings": 128,
}


def edit(folder: Path, *dropped: str, **changes: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in dropped}))


def rename(folder: Path, old: str, new: str) -> None:
    file = folder / "model.safetensors"
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def check_equal(folder: Path, reference: Any, kind: str, length: int = 20, **options: Any) -> None:
    """Compare the logits of a prompt, and the class that computes them."""
    tokens = random_tokens(length, 1)
    ours = LogitsModel(folder, **options)
    assert type(ours.model).__name__ == kind
    ours.add(0, tokens, list(range(-(-length // 4))))
    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(ours.step((0, 0, length))[0], expected, atol=1e-4, rtol=1e-4)


def stored(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": LONGROPE},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_native_classes_cannot_do_runs_through_transformers(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    save_tiny(tmp_path, "llama")
    edit(tmp_path, **changes)
    check_equal(tmp_path, stored(tmp_path), "TransformersModel", context_len=128)


def test_names_without_a_prefix_run_through_transformers(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    rename(tmp_path, "model.", "")
    check_equal(tmp_path, model, "TransformersModel")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_config_without_an_architecture_has_its_usual_one(tmp_path: Path, name: str) -> None:
    model = save_tiny(tmp_path, name)
    edit(tmp_path, "architectures")
    check_equal(tmp_path, model, type(model).__name__)


def test_the_model_type_counts_as_in_transformers(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "qwen2")  # with biases that Llama has not
    edit(tmp_path, architectures=["LlamaForCausalLM"])
    check_equal(tmp_path, model, "Qwen2ForCausalLM")
    edit(tmp_path, model_type="brain")  # which transformers cannot load either
    assert type(LogitsModel(tmp_path).model).__name__ == "LlamaForCausalLM"


def test_another_familys_model_type_runs_through_transformers(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8}
    config = transformers.AutoConfig.for_model("seed_oss", vocab_size=120, pad_token_id=0, **shape)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.float().eval().save_pretrained(tmp_path)
    edit(tmp_path, architectures=["LlamaForCausalLM"])
    check_equal(tmp_path, model, "TransformersModel")


def test_stages_are_refused_with_the_reason(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    edit(tmp_path, hidden_act="relu")
    with pytest.raises(ModelUnsupported, match=r"transformers' code \(hidden_act 'relu' .*use --pp-size 1"):
        LogitsModel(tmp_path, ParallelContext(0, 1, 0, 2))


def test_weights_in_float64_are_computed_in_float32_or_less(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)
    edit(tmp_path, dtype="float64")
    check_equal(tmp_path, model, "LlamaForCausalLM")
    assert LogitsModel(tmp_path, dtype="auto").model.dtype in (torch.float32, torch.bfloat16)


SCALING = {"rope_type": "linear", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rope_parameters": {**SCALING, "factor": None}}, ModelFileBroken, "above 0 as 'factor', has None"),
        ({"rope_parameters": SCALING}, ModelFileBroken, "'linear' needs a number above 0 as 'factor'"),
        (
            {"rope_parameters": {**SCALING, "rope_type": "yarn", "factor": "4"}},
            ModelFileBroken,
            "'yarn' needs a number above 0 as 'factor', has 4",
        ),
        ({"rope_theta": 0, "rope_parameters": None}, ModelFileBroken, "'rope_theta', has"),
        ({"rms_norm_eps": "1e-05"}, ModelFileBroken, r"Expected `float`, got `str` - at `\$.rms_norm_eps`"),
        ({"num_key_value_heads": 2.5}, ModelFileBroken, "num_kv_heads"),
        ({"tie_word_embeddings": "no"}, ModelFileBroken, "tie_word_embeddings"),
        ({"quantization": {"group_size": 64, "bits": 4}}, ModelUnsupported, r"quantized \(by MLX\)"),
        ({"dtype": "float8_e4m3fn"}, ModelUnsupported, "are in float8_e4m3fn, .*name with --dtype one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_that_make_no_model_are_named_in_one_line(
    tmp_path: Path, changes: dict[str, Any], error: type[ModelError], message: str
) -> None:
    save_tiny(tmp_path, "llama")
    edit(tmp_path, **changes)
    with pytest.raises(error, match=message) as caught:
        LogitsModel(tmp_path, dtype="auto")
    assert "\n" not in str(caught.value)


FAMILIES = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "mamba2": {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "num_heads": 8, "n_groups": 1},
    "recurrent_gemma": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "lru_width": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_without_paged_attention_are_refused_in_one_line(tmp_path: Path, family: str) -> None:
    config = transformers.AutoConfig.for_model(family, vocab_size=120, **FAMILIES[family])
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelUnsupported, match=type(model).__name__) as caught:
        LogitsModel(tmp_path)
    assert "\n" not in str(caught.value)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("rope", "wanted", "longest"),
    [
        ({**YARN, "original_max_position_embeddings": 32}, 128, 128),
        (YARN, 256, 256),
        ({**YARN, "rope_type": "linear"}, 256, 256),
        ({**YARN, "rope_type": "dynamic"}, 160, 160),
        ({**YARN, "rope_type": "linear"}, 1000, 256),
        ({"rope_type": "default", "rope_theta": 10000.0}, 1000, 64),
    ],
    ids=["yarn-original", "yarn", "linear", "dynamic", "beyond", "default"],
)
def test_scaled_contexts_can_be_asked_for(
    tmp_path: Path, name: str, rope: dict[str, Any], wanted: int, longest: int
) -> None:
    save_tiny(tmp_path, name)
    edit(tmp_path, max_position_embeddings=64, rope_parameters=rope)
    ours = LogitsModel(tmp_path, context_len=wanted)
    tokens = random_tokens(
        longest, 3
    )  # as long as possible: then dynamic scaling is the same in transformers
    ours.add(0, tokens, list(range(-(-longest // 4))))
    expected = reference_logits(stored(tmp_path), tokens)
    torch.testing.assert_close(ours.step((0, 0, longest))[0], expected, atol=2e-4, rtol=1e-4)
    assert ours.model.config.context_len == longest
    assert LogitsModel(tmp_path).model.config.context_len == 64
