"""Checkpoints, whole and broken: every error is one line that names file and tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from tests.model.checkpoint_kinds import write_foreign
from tests.model.model_fixtures import (
    SHAPE,
    VOCAB,
    LogitsModel,
    load_runner,
    random_tokens,
    reference_logits,
    save_tiny,
)
from ullm.errors import ModelError, ModelFileBroken, ModelNotFound, ModelUnsupported, OutOfMemory
from ullm.hub.files import INDEX, SINGLE, shards
from ullm.model.architectures import registry
from ullm.model.kernels.cpu.build import find_compiler
from ullm.model.loading.checkpoint import choose_context_len
from ullm.model.loading.sources import weight_files


@pytest.fixture
def copy(llama: tuple[Path, Any], tmp_path: Path) -> Path:
    """A tiny Llama that a test may break."""
    return Path(shutil.copytree(llama[0], tmp_path / "model"))


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def check(folder: Path, reference: Any) -> None:
    tokens, model = random_tokens(12, seed=1), LogitsModel(folder)
    model.add(0, tokens, [0, 1, 2])
    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(model.step((0, 0, 12))[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3"])
def test_sharded(name: str, tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, name, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check(tmp_path, reference)


@pytest.mark.skipif(find_compiler() is None, reason="needs the kernels, which need a C++ compiler")
@pytest.mark.parametrize("name", ["llama-tied", "llama-bias"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_stay_so_and_lose_nothing(name: str, stored: torch.dtype, tmp_path: Path) -> None:
    reference = save_tiny(tmp_path / "wide", name).to(stored)
    reference.save_pretrained(tmp_path / "narrow")
    reference.float().save_pretrained(tmp_path / "wide")
    tokens, models = random_tokens(12, seed=1), [LogitsModel(tmp_path / kind) for kind in ("narrow", "wide")]
    for model in models:
        model.add(0, tokens, [0, 1, 2])
    logits = [model.step((0, 0, 12))[0] for model in models]
    assert torch.equal(*logits)
    narrow, wide = (model.model for model in models)
    assert narrow.weight_bytes() == wide.weight_bytes() / 2
    assert narrow.weight_formats() == (str(stored).removeprefix("torch."),)
    assert wide.weight_formats() == ("float32",)


def test_modules_of_several_dtypes_keep_all_of_them(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, "llama-bias")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        if "v_proj.weight" in key or "down_proj" in key:
            tensors[key] = tensors[key].bfloat16()
    save_file(tensors, file)
    reference.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, strict=False)
    check(tmp_path, reference)


def test_old_style_rope(llama: tuple[Path, Any], copy: Path) -> None:
    edit(copy, rope_parameters=..., rope_theta=10000.0, rope_scaling=None)
    check(copy, llama[1])


def test_unused_tensors_are_ignored(llama: tuple[Path, Any], copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"model.rotary_emb.inv_freq": torch.zeros(4)}, copy / "model.safetensors")
    check(copy, llama[1])


def test_truncated_file(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelFileBroken, match=r"model\.safetensors: is not a complete safetensors file"):
        LogitsModel(copy)


def test_missing_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(
        ModelFileBroken, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' of shape \(96, 64\)"
    ):
        LogitsModel(copy)


def test_wrong_shape_names_both(copy: Path) -> None:
    edit(copy, intermediate_size=80)
    with pytest.raises(
        ModelFileBroken, match=r"mlp\.\w+\.weight' has shape \(.*96.*\), the config says \(.*80.*\)"
    ):
        LogitsModel(copy)


def test_missing_shard(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", max_shard_size="50KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ModelFileBroken, match=f"names {victim.name}, which does not exist"):
        LogitsModel(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, ModelUnsupported, "quantized \\(hqq\\)"),
        (
            {"architectures": ["BrainForCausalLM"], "model_type": "brain"},
            ModelUnsupported,
            "BrainForCausalLM",
        ),
        ({"architectures": [], "model_type": "brain"}, ModelUnsupported, "names no architecture"),
        ({"hidden_size": ...}, ModelFileBroken, "config.json: has no 'hidden_size'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, ModelFileBroken, "short_factor"),
    ],
)
def test_configs_that_cannot_run(
    copy: Path, changes: dict[str, Any], error: type[ModelError], message: str
) -> None:
    edit(copy, **changes)
    with pytest.raises(error, match=message) as caught:
        LogitsModel(copy)
    assert "\n" not in str(caught.value)


def test_config_is_not_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelFileBroken, match=r"config\.json: not readable as JSON"):
        LogitsModel(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ModelFileBroken, match="must hold a JSON object"):
        LogitsModel(copy)


def test_nothing_there(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        LogitsModel(tmp_path / "nowhere")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"model\.safetensors"):
        LogitsModel(copy)


@pytest.mark.parametrize(("wanted", "gets"), [(None, 256), (100, 100), (257, 256)])
def test_the_context_is_never_longer_than_the_models(wanted: int | None, gets: int) -> None:
    assert choose_context_len({"max_position_embeddings": 256}, wanted) == gets


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "sixty"}, {"num_hidden_layers": -2}, {"vocab_size": None}]
)
def test_a_config_that_makes_no_sense_is_named(copy: Path, changes: dict[str, Any]) -> None:
    edit(copy, **changes)
    with pytest.raises(ModelFileBroken, match=r"config\.json: ") as caught:
        LogitsModel(copy)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "available_memory", lambda: 1000)
    with pytest.raises(OutOfMemory, match=r"the weights need .* MiB, the cpu has 0\.0 MiB free"):
        LogitsModel(copy)


def test_gguf(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, "llama")
    file = tmp_path / "tiny.gguf"
    write_gguf(file, reference.state_dict())
    check(file, reference)
    assert load_runner(file).close()


def write_gguf(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file as llama.cpp's converter does: other names, and query and key rows in pairs."""
    writer = GGUFWriter(str(file), "llama")
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            heads = tensor.shape[0] // 16
            tensor = tensor.view(heads, 2, 8, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    replacements = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for old, new in replacements.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("name", ["llama", "foreign"])
def test_a_single_file_counts_before_an_index(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As for transformers: which of two would be read silently otherwise."""
    if name == "llama":
        save_tiny(tmp_path, name)
    else:
        write_foreign(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, tmp_path / "model-1.safetensors")
    names = dict.fromkeys(tensors, "model-1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = random_tokens(9, 1)
    ours = LogitsModel(tmp_path)
    assert f"{SINGLE} is read" in caplog.text
    ours.add(0, tokens, [0, 1, 2])
    torch.testing.assert_close(
        ours.step((0, 0, 9))[0], reference_logits(reference, tokens), atol=1e-4, rtol=0
    )
    assert shards(tmp_path) == [tmp_path / SINGLE]
    assert weight_files(tmp_path) == [tmp_path / SINGLE]
