"""Checkpoints that are not what they say, or out to do harm: one line, at once, and no code of theirs."""

from __future__ import annotations

import json
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.model_fixtures import config
from ullm.errors import ModelFileBroken, ModelNotFound
from ullm.hub.files import check_weights, read_json
from ullm.model.architectures.transformers_model import TransformersModel
from ullm.model.loading.checkpoint import read_checkpoint
from ullm.model.loading.sources import safetensors_sources

DEEP = "[" * 100_000 + "]" * 100_000
ARCHITECTURE = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}


def read(path: Path) -> Any:
    return read_checkpoint(path, config(path), torch.device("cpu"))


def write_config(path: Path, **changes: Any) -> None:
    (path / "config.json").write_text(json.dumps({**ARCHITECTURE, **changes}))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_json_of_many_brackets(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f'{{"a": {DEEP}}}')
    with pytest.raises(ModelFileBroken, match="nested too deeply") as caught:
        read_json(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_safetensors_header_of_many_brackets(tmp_path: Path) -> None:
    header = f'{{"a": {DEEP}}}'.encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModelFileBroken, match="its header is not that of a safetensors file"):
        check_weights(tmp_path)
    with pytest.raises(ModelFileBroken, match="recursion limit"):
        list(safetensors_sources(file))


@pytest.mark.parametrize("end", ["1e999", "NaN", '"x"', "[]", "null"])
def test_a_safetensors_header_with_offsets_that_are_none(tmp_path: Path, end: str) -> None:
    header = f'{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": [0, {end}]}}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(ModelFileBroken, match="its header is not that of a safetensors file"):
        check_weights(tmp_path)


def test_a_safetensors_header_that_is_too_long(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.write(struct.pack("<Q", 1 << 30))
        sparse.truncate((1 << 30) + 8)
    with pytest.raises(ModelFileBroken, match="its header has 1073741824 bytes"):
        check_weights(tmp_path)


@pytest.mark.parametrize("architectures", [[5], "LlamaForCausalLM", {"0": 1}, [None], [["A"]], 7], ids=str)
def test_architectures_that_are_not_names(architectures: Any, tmp_path: Path) -> None:
    write_config(tmp_path, architectures=architectures)
    with pytest.raises(ModelFileBroken, match="'architectures' must be a list of names"):
        read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 100_000},
        {"n_layer": 100_000},
        {"num_local_experts": 1e9},
        {"text_config": {"num_hidden_layers": 100_000}},
    ],
    ids=str,
)
def test_numbers_of_layers_beyond_reason(changes: dict[str, Any], tmp_path: Path) -> None:
    write_config(tmp_path, **changes)
    began = time.process_time()
    with pytest.raises(ModelFileBroken, match="at most 2048 are possible"):
        read(tmp_path)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": "many"}, "'max_position_embeddings' must be a number"),
        ({"max_position_embeddings": [1]}, "'max_position_embeddings' must be a number"),
        ({"n_positions": "1"}, "'n_positions' must be a number"),
        ({"torch_dtype": 5}, ""),
        ({"eos_token_id": "x"}, "eos_token_id"),
    ],
    ids=str,
)
def test_values_of_another_type(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Those that nothing needs are ignored."""
    write_config(tmp_path, **changes)
    if not message:
        assert read(tmp_path).architecture == "GPT2LMHeadModel"
        return
    with pytest.raises(ModelFileBroken, match=message):
        read(tmp_path)


class Planted:
    """Something whose unpickling makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    """Of an architecture that is loaded through transformers, which would read it."""
    write_config(tmp_path, n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=16)
    mark = tmp_path / "was-read"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(ModelNotFound, match=r"must have model\.safetensors"):
        TransformersModel.load(read(tmp_path), config(tmp_path), torch.device("cpu"))
    model = torch.nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # a harmless one is refused as well
    with pytest.raises(ModelNotFound, match=r"must have model\.safetensors"):
        TransformersModel.load(read(tmp_path), config(tmp_path), torch.device("cpu"))
    assert not mark.exists()
