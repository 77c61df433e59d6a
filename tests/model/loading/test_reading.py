"""What a checkpoint's files say is acted on, or refused: never another model than transformers would run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.model.gguf_fixtures import HIDDEN, VOCAB, finish, start_file, write_model
from tests.model.model_fixtures import (
    SHAPE,
    generate,
    load_runner,
    random_tokens,
    reference_greedy,
    save_tiny,
)
from ullm.errors import ModelError, ModelUnsupported
from ullm.model.layers.rope import read_rope
from ullm.model.loading.checkpoint import choose_context_len
from ullm.model.loading.gguf import read_gguf_config
from ullm.model.loading.gguf_file import GgufFile
from ullm.model.loading.quantized.formats import find_format

WEIGHTS = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROMPT = random_tokens(13, seed=1)


def reread(folder: Path) -> Any:
    """Return the model as transformers reads it now."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def change(folder: Path, **config: Any) -> None:
    file = folder / "config.json"
    content = {**json.loads(file.read_text("utf-8")), **config}
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}), "utf-8")


def same(folder: Path, count: int = 20) -> None:
    assert generate(load_runner(folder), PROMPT, count) == reference_greedy(reread(folder), PROMPT, count)


# --- heads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "qwen3"])
def test_a_head_of_its_own_is_used(tmp_path: Path, name: str) -> None:
    """As after merging an adapter with a trained embedding."""
    save_tiny(tmp_path, name)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[HEAD] = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(3))
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    same(tmp_path)


def test_an_equal_head_stays_tied(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama-tied")
    plain = load_runner(tmp_path)._rank
    assert plain is not None
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    rank = load_runner(tmp_path)._rank
    assert rank is not None
    assert rank.info.num_parameters == plain.info.num_parameters
    same(tmp_path)


def test_only_the_head_is_stored(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, "llama-tied")
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert generate(load_runner(tmp_path), PROMPT, 10) == reference_greedy(reference, PROMPT, 10)


# --- rotary embeddings -----------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": YARN},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": YARN, "rope_theta": 5e5},
        {
            "rope_parameters": {**YARN, "rope_theta": 1e4, "original_max_position_embeddings": 32},
            "original_max_position_embeddings": 128,
        },
        {"rope_parameters": {**YARN, "rope_theta": 1e4, "original_max_position_embeddings": 32}},
        {"rope_parameters": None, "rope_theta": 2e4},
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_rotary_parameters_count_as_for_transformers(
    tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    save_tiny(tmp_path, name)
    change(tmp_path, **({"rope_parameters": "gone", "rope_theta": "gone"} | config))
    same(tmp_path)


def test_the_older_name_of_rotary_parameters_wins() -> None:
    both = {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": YARN}
    assert read_rope({**SHAPE, **both}, 1e4)["rope_type"] == "yarn"


# --- contexts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"max_position_embeddings": 4096},
        {"n_positions": 4096},
        {"max_seq_len": 4096},
        {"seq_length": 4096},
        {"text_config": {"max_position_embeddings": 4096}},
        {"llm_config": {"max_position_embeddings": 4096}, "vision_config": {"max_position_embeddings": 9}},
    ],
)
def test_the_context_length_wherever_it_is(config: dict[str, Any]) -> None:
    assert choose_context_len(config, None) == 4096
    assert choose_context_len(config, 100) == 100


@pytest.mark.parametrize("value", ["4096", True, -1, 1e30])
def test_a_context_length_that_is_none(tmp_path: Path, value: object) -> None:
    save_tiny(tmp_path, "llama")
    change(tmp_path, max_position_embeddings=value)
    with pytest.raises(ModelError, match="'max_position_embeddings' must be a number of tokens"):
        load_runner(tmp_path)


# --- tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_codes_are_not_taken_for_weights(tmp_path: Path, dtype: torch.dtype, native: bool) -> None:
    save_tiny(tmp_path, "llama")
    if not native:  # through transformers' code
        change(tmp_path, architectures=["Olmo2ForCausalLM"], model_type="olmo2")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[name] = (tensors[name] * 100).to(dtype)
    tensors[f"{name}_scale"] = torch.tensor(0.01)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelUnsupported, match=f"tensor '{name}' is stored in .*a quantized format"):
        load_runner(tmp_path)


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_files_that_tell_of_quantization(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text('{"bits": 3, "quant_algo": "W4A8"}')
    with pytest.raises(ModelUnsupported, match=file):
        find_format(tmp_path, {})
    with pytest.raises(ModelUnsupported, match="int-quantized"):
        find_format(tmp_path, {"compression_config": {"quant_method": "int-quantized"}})
    older = find_format(tmp_path, {"compression_config": {"format": "int-quantized"}})
    assert older is not None
    assert older.name == "compressed-tensors"


def test_tensors_without_a_place_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny(tmp_path, "llama")
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    load_runner(tmp_path)
    assert "no place" not in caplog.text
    tensors["model.layers.0.self_attn.q_proj.lora_A"] = torch.zeros(8)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    load_runner(tmp_path)
    assert "model.layers.0.self_attn.q_proj.lora_A" in caplog.text


# --- GGUF --------------------------------------------------------------------------------------------------


def gguf_config(folder: Path, **keys: float | str) -> dict[str, Any]:
    writer = start_file(folder / "model.gguf")
    writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
    for name, value in keys.items():
        key = f"llama.{name.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    finish(writer)
    return read_gguf_config(folder / "model.gguf")


def test_rotary_scaling_of_gguf(tmp_path: Path) -> None:
    assert gguf_config(tmp_path)["rope_scaling"] is None
    linear = gguf_config(tmp_path, rope__scale_linear=4.0)["rope_scaling"]
    assert linear == {"rope_type": "linear", "factor": 4.0}
    yarn = gguf_config(
        tmp_path,
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__attn_factor=2.0,
        rope__scaling__yarn_beta_fast=16.0,
        rope__scaling__yarn_beta_slow=2.0,
        rope__scaling__original_context_length=64,
    )["rope_scaling"]
    assert yarn.pop("attention_factor") == pytest.approx(2 * 1.1386, abs=1e-3)
    assert yarn == {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "original_max_position_embeddings": 64,
    }


@pytest.mark.parametrize(
    "keys",
    [
        {"rope__dimension_count": 8},
        {"attention__value_length": 8},
        {"attention__sliding_window": 16},
        {"rope__scaling__attn_factor": 2.0},
        {"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0},
        {"attention__scale": 0.5},
        {"logit_scale": 8.0},
        {"final_logit_softcapping": 30.0},
    ],
)
def test_metadata_that_would_change_the_numbers(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(ModelUnsupported):
        gguf_config(tmp_path, **keys)


def test_metadata_that_nobody_knows_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gguf_config(tmp_path, rope__scaling__finetuned=1, attention__sliding_window=9999)
    assert "no effect" not in caplog.text
    gguf_config(tmp_path, attention__wobble=0.5)
    assert "llama.attention.wobble" in caplog.text


def test_a_gguf_in_parts(tmp_path: Path) -> None:
    """The head is in the second part; without looking there, it would be tied to the embedding."""
    whole = write_model(tmp_path / "whole.gguf", tied=False)
    source = GgufFile(whole)
    assert "output.weight" in source.tensors
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    names = [set(source.tensors) - {"output.weight"}, {"output.weight"}]
    for number, (part, wanted) in enumerate(zip(parts, names, strict=True)):
        copy_part(source, part, wanted, number)
    assert read_gguf_config(parts[0]) == read_gguf_config(whole)
    assert generate(load_runner(parts[0]), [3, 4, 5], 10) == generate(load_runner(whole), [3, 4, 5], 10)
    with pytest.raises(ModelUnsupported, match="name part 00001"):
        read_gguf_config(parts[1])
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"00002-of-00002\.gguf: this part of the model is missing"):
        read_gguf_config(parts[0])


def copy_part(source: Any, part: Path, names: set[str], number: int) -> None:
    """Write some tensors of a model as llama.cpp's gguf-split does: only the first part has the metadata."""
    writer = start_file(part) if number == 0 else gguf.GGUFWriter(part, "llama")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", 2)
    writer.add_int32("split.tensors.count", len(source.tensors))
    for name in sorted(names):
        tensor = source.tensors[name]
        raw = source.raw(name).reshape(*tensor.shape[:-1], -1)
        if tensor.type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, source.values(name))
        else:
            writer.add_tensor(name, raw, raw_dtype=tensor.type)
    finish(writer)
