"""The tokens that end a text: from the checkpoint's files and from its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from ullm.config import ModelConfig
from ullm.errors import ModelFileBroken
from ullm.model.loading.eos_tokens import eos_token_ids

ADDED = [{"id": 0, "content": "<|endoftext|>"}, {"id": 2, "content": "<|im_end|>"}]
DECODER = {str(token["id"]): {"content": token["content"]} for token in ADDED}


def write(folder: Path, **files: object) -> Path:
    """Write JSON files, named without their suffix."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def ends(path: Path, hf: dict[str, Any], tokenizer: Path | None = None) -> tuple[int, ...]:
    config = ModelConfig(model=str(path), tokenizer=None if tokenizer is None else str(tokenizer))
    return eos_token_ids(hf, path, config)


@pytest.mark.parametrize(
    ("generation", "hf", "expected"),
    [
        ({}, {}, ()),
        ({}, {"eos_token_id": 2}, (2,)),
        ({"eos_token_id": [5, 6, 5]}, {"eos_token_id": 2}, (5, 6)),
        ({"eos_token_id": 0}, {"eos_token_id": 2}, (0,)),
        ({"eos_token_id": None}, {"eos_token_id": [1, 3]}, (1, 3)),
        ({}, {"text_config": {"eos_token_id": 7}}, (7,)),
    ],
)
def test_files_of_the_model(
    generation: dict[str, Any], hf: dict[str, Any], expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert ends(write(tmp_path, generation_config=generation), hf) == expected


def test_a_folder_without_any_file_names_no_token(tmp_path: Path) -> None:
    assert ends(tmp_path, {}) == ()


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<|im_end|>", "added_tokens_decoder": DECODER}},
        {"tokenizer_config": {"eos_token": "<|im_end|>"}, "tokenizer": {"added_tokens": ADDED}},
        {"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}, "tokenizer": {"added_tokens": ADDED}},
        {"special_tokens_map": {"eos_token": "<|im_end|>"}, "tokenizer": {"added_tokens": ADDED}},
        {
            "tokenizer_config": {"eos_token": "<|im_end|>"},
            "tokenizer": {"added_tokens": ADDED[:1], "model": {"vocab": {"a": 1, "<|im_end|>": 2}}},
        },
        {
            "tokenizer_config": {"eos_token": "<|im_end|>"},
            "tokenizer": {"model": {"vocab": [["a", -1.0], ["b", -2.0], ["<|im_end|>", 0.0]]}},
        },
    ],
    ids=["decoder", "added", "object", "map", "vocabulary", "unigram"],
)
def test_the_tokenizers_own_token_ends_a_text_too(files: dict[str, Any], tmp_path: Path) -> None:
    """Some chat models' config still names only the base model's token."""
    assert ends(write(tmp_path, **files), {"eos_token_id": 0}) == (0, 2)


def test_the_older_file_counts_before_the_newer_one(tmp_path: Path) -> None:
    """As for transformers, unless the newer one says what its tokens are."""
    settings, older = {"eos_token": "<|endoftext|>"}, {"eos_token": "<|im_end|>"}
    files = {"tokenizer_config": settings, "special_tokens_map": older, "tokenizer": {"added_tokens": ADDED}}
    assert ends(write(tmp_path, **files), {}) == (2,)
    write(tmp_path, tokenizer_config=settings | {"added_tokens_decoder": DECODER})
    assert ends(tmp_path, {}) == (0,)


def test_a_base_model_ends_with_one_token(tmp_path: Path) -> None:
    """The chat tokens that its tokenizer knows as well do not end its texts."""
    settings = {"eos_token": "<|endoftext|>", "added_tokens_decoder": DECODER}
    write(tmp_path, tokenizer_config=settings, tokenizer={"added_tokens": ADDED})
    assert ends(tmp_path, {"eos_token_id": 0}) == (0,)


@pytest.mark.parametrize("tokenizer", [{}, {"added_tokens": ADDED}, {"model": {"vocab": {}}}])
def test_a_token_that_the_tokenizer_does_not_have(tokenizer: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"eos_token": "</s>"}, tokenizer={"model": {}} | tokenizer)
    assert ends(tmp_path, {"eos_token_id": 1}) == (1,)


def test_another_tokenizer_counts_instead_of_the_models_own(tmp_path: Path) -> None:
    own = {"eos_token": "<|im_end|>", "added_tokens_decoder": DECODER}
    other = {"eos_token": "</s>", "added_tokens_decoder": {"9": {"content": "</s>"}}}
    model = write(tmp_path / "model", tokenizer_config=own)
    assert ends(model, {"eos_token_id": 0}, write(tmp_path / "other", tokenizer_config=other)) == (0, 9)


def test_another_tokenizer_that_is_not_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model folder on a shared disk may be served where the front end's cache is not."""
    assert ends(tmp_path, {"eos_token_id": 1}, tmp_path / "missing") == (1,)
    (record,) = caplog.records
    assert "--tokenizer" in record.getMessage()


@pytest.mark.parametrize("value", ["2", 2.5, [1, None], True])
def test_something_else_than_numbers(value: object, tmp_path: Path) -> None:
    with pytest.raises(ModelFileBroken, match=r"config\.json.*eos_token_id") as caught:
        ends(tmp_path, {"eos_token_id": value})
    assert "\n" not in str(caught.value)


def test_a_tokenizer_file_that_is_not_json(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"eos_token": "</s>"})
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileBroken, match=r"tokenizer\.json: cannot be read"):
        ends(tmp_path, {})


@pytest.mark.parametrize(
    ("named", "expected"), [({}, (0,)), ({"eot": 2}, (0, 2)), ({"eot": 2, "eom": 1}, (0, 2, 1))]
)
def test_gguf(named: dict[str, int], expected: tuple[int, ...], tmp_path: Path) -> None:
    """Tokens count if the metadata name them, whatever the vocabulary has besides."""
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(["<|endoftext|>", "<|eom_id|>", "<|im_end|>"])
    writer.add_eos_token_id(0)
    for kind, token_id in named.items():
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert ends(path, {"eos_token_id": 0}) == expected
    assert ends(write(tmp_path / "folder"), {"eos_token_id": 0}, path) == expected
