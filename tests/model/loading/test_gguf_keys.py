"""No metadata of a GGUF file are left unread by accident, and none is of a type that nobody expects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.constants import Keys

from tests.model.gguf_fixtures import HIDDEN, VOCAB, finish, start_file, write_model
from ullm.errors import ModelError, ModelUnsupported
from ullm.model.loading import convert
from ullm.model.loading.gguf import read_gguf_config, write_tokenizer
from ullm.model.loading.gguf_keys import MUST_BE, without_effect
from ullm.tokenization.chat_template import read_templates

HAVE_AN_EFFECT = {
    *("general.sampling.mirostat", "general.sampling.mirostat_eta", "general.sampling.mirostat_tau"),
    *("general.sampling.penalty_last_n", "general.sampling.sequence", "general.sampling.xtc_probability"),
    *("general.sampling.xtc_threshold", "tokenizer.rwkv.world", *MUST_BE),
}
"""Keys of llama.cpp that are named when they are there."""


def test_every_key_of_the_format_is_known() -> None:
    classes = (Keys.General, Keys.Tokenizer, Keys.Split)
    keys = [value for each in classes for name, value in vars(each).items() if name.isupper()]
    content = {str(key).format(id=0, name="x"): 1 for key in keys if isinstance(key, str)}
    assert len(content) > 80
    assert set(without_effect(content, ())) <= HAVE_AN_EFFECT
    assert without_effect({key: values[0] for key, values in MUST_BE.items()}, ()) == []


def write(folder: Path, add: Callable[[GGUFWriter], object]) -> Path:
    writer = start_file(folder / "model.gguf")
    writer.add_tokenizer_model("llama")
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
    add(writer)
    finish(writer)
    return folder / "model.gguf"


def test_what_has_no_effect_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_gguf_config(write_model(tmp_path / "plain.gguf"))
    assert caplog.text == ""

    def add(writer: GGUFWriter) -> None:
        writer.add_remove_extra_whitespaces(True)
        writer.add_string("other.key", "x")
        writer.add_float32("llama.unheard_of", 2.0)
        writer.add_author("somebody")

    file = write(tmp_path, add)
    convert.write_gguf(file, tmp_path, "tokenizer")
    assert caplog.text == ""  # it is said once, and not by the conversion as well
    read_gguf_config(file)
    names = "llama.unheard_of, other.key, tokenizer.ggml.remove_extra_whitespaces"
    assert f"metadata that have no effect here: {names}" in caplog.text


@pytest.mark.parametrize("kind", ["adapter", "imatrix", "mmproj"])
def test_what_is_no_model_is_refused(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path, lambda writer: writer.add_type(kind))
    with pytest.raises(ModelUnsupported, match=f"is of type '{kind}' and no model"):
        read_gguf_config(file)


def test_named_templates_are_read(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    file = write(tmp_path, lambda writer: writer.add_chat_template(templates))
    write_tokenizer(file, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert read_templates(tmp_path, config) == {"default": "a", "tool_use": "b"}


@pytest.mark.parametrize("which", ["unknown", "padding", "eot"])
def test_an_id_beyond_the_vocabulary_is_none(tmp_path: Path, which: str) -> None:
    """Some files have -1 for what there is not."""
    file = write(
        tmp_path, lambda writer: writer.add_uint32(f"tokenizer.ggml.{which}_token_id", (1 << 32) - 1)
    )
    write_tokenizer(file, tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["pad_token_id"] is None
    assert generation["eos_token_id"] == 2


OTHER_TYPES: dict[str, Callable[[GGUFWriter, str], object]] = {
    "tokenizer.ggml.eot_token_id": lambda writer, key: writer.add_string(key, "t3"),
    "tokenizer.ggml.token_type": lambda writer, key: writer.add_array(key, ["x"] * VOCAB),
    "tokenizer.ggml.merges": lambda writer, key: writer.add_array(key, [1, 2]),
}


@pytest.mark.parametrize("key", OTHER_TYPES)
def test_values_of_another_type(tmp_path: Path, key: str) -> None:
    file = write(tmp_path, lambda writer: OTHER_TYPES[key](writer, key))
    with pytest.raises(ModelError, match=f"model.gguf: the metadata's '{key}' is "):
        write_tokenizer(file, tmp_path)
