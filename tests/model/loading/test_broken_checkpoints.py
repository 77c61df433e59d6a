"""Checkpoints whose files do not fit together, or ask for more than they have: refused before it costs."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.model.checkpoint_kinds import KINDS
from tests.model.model_fixtures import SHAPE, LogitsModel, config, load_runner, save_tiny
from tests.model.quantized_fixtures import CASES, quantize_checkpoint
from ullm.errors import ModelError, ModelFileBroken, ModelNotFound, OutOfMemory
from ullm.hub.files import INDEX, MAX_HEADER, read_index, read_json, shards
from ullm.model.architectures import registry
from ullm.model.execution.identity import weights_fingerprint
from ullm.model.loading.eos_tokens import eos_token_ids
from ullm.model.loading.gguf_file import GgufFile
from ullm.model.loading.sources import SINGLE
from ullm.testing import tiny_tokenizer
from ullm.tokenization.backend import load_backend


def foreign(folder: Path, **save: Any) -> Path:
    """A model that runs through transformers' code."""
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SHAPE)).save_pretrained(folder, **save)
    return folder


def change(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        LogitsModel(folder, cpu_kernels=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", [["gpt_neox"], {"a": 1}, 7], ids=str)
def test_a_model_type_that_is_no_name(tmp_path: Path, kind: Any) -> None:
    change(foreign(tmp_path), model_type=kind)
    assert "does not know GPTNeoXForCausalLM" in refusal(tmp_path)


# --- sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1 << 20, 1 << 33])
def test_a_config_of_a_much_larger_model_allocates_nothing(tmp_path: Path, vocab: int) -> None:
    """Transformers would make the weights that the files lack."""
    change(foreign(tmp_path), vocab_size=vocab)
    assert "config.json: describes a model of" in refusal(tmp_path)


def test_shapes_are_compared_before_there_is_memory_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "llama")
    change(tmp_path, intermediate_size=1 << 24)
    monkeypatch.setattr(registry, "allocate", lambda *_: pytest.fail("memory was wanted"))
    assert "mlp.down_proj.weight' has shape (64, 96), the config says (64, 16777216)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 1 << 32}, "head_dim is 4294967296, and can be at most 65536"),
        ({"hidden_size": 1 << 62}, "hidden_size is 4611686018427387904, and can be at most"),
        ({"vocab_size": 10**40}, "vocab_size is 1"),
    ],
    ids=["head", "hidden", "vocabulary"],
)
def test_sizes_beyond_reason(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_tiny(tmp_path, "llama")
    change(tmp_path, **changes)
    assert message in refusal(tmp_path)


def test_a_context_whose_tables_do_not_fit(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    change(tmp_path, max_position_embeddings=1 << 39)
    with pytest.raises(OutOfMemory, match=r"a context of 549755813888 tokens needs .* smaller --context-len"):
        LogitsModel(tmp_path)
    LogitsModel(tmp_path, context_len=64)


# --- safetensors and their index -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../o.safetensors",
        "/o.safetensors",
        "config.json",
        5,
        None,
        ["x"],
        "",
        ".",
        "a\0b",
        "[" * 256,
        "\udc00\ud800",
    ],
    ids=repr,
)
def test_an_index_that_names_something_else(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    save_tiny(folder, "llama")
    shutil.copy(folder / SINGLE, tmp_path / "o.safetensors")
    names = dict.fromkeys(load_file(folder / SINGLE), "model-1.safetensors")
    (folder / SINGLE).rename(folder / "model-1.safetensors")
    names["lm_head.weight"] = name
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    for read in (lambda: read_index(folder / INDEX), lambda: shards(folder), lambda: LogitsModel(folder)):
        with pytest.raises(ModelFileBroken, match=r"which is (not in its folder|no \.safetensors file)"):
            read()


def twice(folder: Path) -> None:
    """Put a tensor into two files."""
    tensors = load_file(folder / SINGLE)
    name = min(tensors)
    save_file(tensors, folder / "model-1.safetensors", {"format": "pt"})
    save_file({name: tensors[name] + 1}, folder / "model-2.safetensors", {"format": "pt"})
    (folder / SINGLE).unlink()
    names = {**dict.fromkeys(tensors, "model-1.safetensors"), name: "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize("kind", ["native", "foreign", "quantized"])
def test_a_tensor_in_two_files(tmp_path: Path, kind: str) -> None:
    if kind == "foreign":
        foreign(tmp_path)
    else:
        model = save_tiny(tmp_path, "llama")
    if kind == "quantized":
        quantize_checkpoint(tmp_path, model, CASES["gptq"])
    twice(tmp_path)
    assert "is in model-1.safetensors as well; fetch the model again" in refusal(tmp_path)


def test_shards_without_their_index(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", max_shard_size="60KB")
    count = len(list(tmp_path.glob("*.safetensors")))
    (tmp_path / INDEX).unlink()
    assert f"which says what its {count} .safetensors files hold; fetch the model again" in refusal(tmp_path)


def test_a_link_to_itself(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).symlink_to(SINGLE)
    assert weights_fingerprint(tmp_path) == ""
    refusal(tmp_path)


# --- files that do not end -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", SINGLE, "generation_config.json", "model.gguf"])
def test_a_named_pipe_is_not_read(tmp_path: Path, name: str) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "model.gguf":
        with pytest.raises(ModelFileBroken, match="is a named pipe and not a file"):
            GgufFile(tmp_path / name)
    else:
        assert "is a named pipe and not a file" in refusal(tmp_path)


def test_a_file_of_json_beyond_reason(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(ModelFileBroken, match=f"has 1099511627776 bytes; at most {MAX_HEADER} are read"):
        read_json(tmp_path / "config.json")


def test_a_gguf_header_beyond_reason(tmp_path: Path) -> None:
    """A text as long as the file."""
    file = tmp_path / "model.gguf"
    with file.open("wb") as sparse:
        sparse.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1))
        sparse.write(struct.pack("<Q", 4) + b"text" + struct.pack("<IQ", 8, 1 << 35))
        sparse.truncate(1 << 36)
    with pytest.raises(ModelFileBroken, match=f"its header has more than {MAX_HEADER} bytes"):
        GgufFile(file)


# --- tokenizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("value", [True, 7, "<tool>"], ids=str)
def test_special_tokens_that_are_no_list(tmp_path: Path, file: str, key: str, value: Any) -> None:
    tiny_tokenizer(tmp_path)
    (tmp_path / file).write_text(json.dumps({key: value}))
    with pytest.raises(ModelFileBroken, match=f"{file}: '{key}' must be a list of tokens, is {value}"):
        load_backend(tmp_path / "tokenizer.json")


def test_half_a_surrogate_pair_as_a_token(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    file = tmp_path / "special_tokens_map.json"
    file.write_text('{"additional_special_tokens": ["\\ud800"]}')
    with pytest.raises(ModelFileBroken, match=r"special_tokens_map.json: has half a surrogate pair"):
        load_backend(tmp_path / "tokenizer.json")
    file.write_text('{"additional_special_tokens": ["\\ud83d\\ude00"]}')
    assert load_backend(tmp_path / "tokenizer.json").token_to_id("\U0001f600") is not None


@pytest.mark.parametrize("decoder", [[1], "x", 7, {"x": {"content": "<eos>"}}], ids=str)
def test_added_tokens_of_another_type(tmp_path: Path, decoder: Any) -> None:
    content = {"eos_token": "<eos>", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelFileBroken, match=r"_config.json: its added_tokens_decoder is not"):
        eos_token_ids({}, tmp_path, config(tmp_path))


def test_a_tokenizer_that_is_not_utf_8(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"<|im_start|>", b"<|im_\xff|>"))
    with pytest.raises(ModelFileBroken, match=r"tokenizer.json: cannot be read: 'utf-8' codec"):
        eos_token_ids({}, tmp_path, config(tmp_path))


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / SINGLE).unlink()
    with pytest.raises(ModelNotFound, match="convert the weights to safetensors"):
        LogitsModel(tmp_path)


@pytest.mark.parametrize("kind", ["native", "tied", "foreign"])
def test_weights_that_are_no_numbers(tmp_path: Path, kind: str) -> None:
    """They would make texts of one token without a word."""
    KINDS[kind](tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    name = max(name for name in tensors if "norm" in name and name.endswith(".weight"))
    tensors[name][3] = float("nan")
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(ModelFileBroken, match=r"no numbers \(NaN\) in float32: they are damaged"):
        load_runner(tmp_path)
