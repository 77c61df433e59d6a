"""Tokens that only the files beside tokenizer.json name: one id each, special or not, as for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from ullm.errors import ModelFileBroken
from ullm.testing.models import tiny_tokenizer
from ullm.tokenization import backend as backend_module
from ullm.tokenization.backend import load_backend, special_token_ids

TEXT = "a <tool>x</tool> <|im_end|> <extra> b"


def write(folder: Path, **files: dict[str, Any]) -> int:
    """Write a tokenizer, and change the files beside it; return the number of its tokens."""
    size = tiny_tokenizer(folder)
    for name, content in files.items():
        file = folder / f"{name}.json"
        before = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        file.write_text(json.dumps(before | content), "utf-8")
    return size


def entry(text: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": text, **plain, **flags}


def decoder(size: int, *entries: dict[str, Any]) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(size + number): each for number, each in enumerate(entries)}}


SIZE = 512
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "nothing": {},
    "added_tokens_decoder": {
        "tokenizer_config": decoder(SIZE, entry("<tool>"), entry("</tool>", special=True))
    },
    "order": {"tokenizer_config": decoder(SIZE, entry("</tool>"), entry("<tool>", lstrip=True))},
    "special_tokens_map": {"special_tokens_map": {"additional_special_tokens": ["<tool>", "</tool>"]}},
    "additional": {"tokenizer_config": {"additional_special_tokens": ["<extra>"]}},
    "named": {"tokenizer_config": {"pad_token": "<extra>"}},
    "older file before the newer": {
        "tokenizer_config": {"pad_token": "<extra>"},
        "special_tokens_map": {"pad_token": "<tool>"},
    },
    "older file adds": {
        "tokenizer_config": {"pad_token": "<tool>", "bos_token": "<extra>"},
        "special_tokens_map": {"unk_token": "</tool>"},
    },
    "flags in the older file": {
        "special_tokens_map": {"pad_token": {"content": "<extra>", "lstrip": True, "rstrip": True}}
    },
    "flags in the newer file": {
        "tokenizer_config": {"pad_token": {"__type": "AddedToken", "content": "<extra>", "lstrip": True}}
    },
    "lists in both": {
        "tokenizer_config": {"additional_special_tokens": ["<extra>"]},
        "special_tokens_map": {"additional_special_tokens": ["<tool>"]},
    },
    "newer lists in both": {
        "tokenizer_config": {"extra_special_tokens": ["<extra>"]},
        "special_tokens_map": {"extra_special_tokens": ["<tool>", "<extra>"]},
    },
    "older file of the config's list": {
        "tokenizer_config": {"extra_special_tokens": ["<extra>"]},
        "special_tokens_map": {"additional_special_tokens": ["<tool>"]},
    },
    "of one model": {"tokenizer_config": {"image_token": "<extra>", "add_bos_token": True}},
    "of one model, older": {"special_tokens_map": {"image_token": "<extra>"}},
    "of one model, in an object": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<extra>"}}},
    "split": {"tokenizer_config": {"split_special_tokens": True}},
    "special only in the config": {
        "tokenizer_config": {"added_tokens_decoder": {"300": entry("<tool>", special=True)}}
    },
}


@pytest.mark.parametrize("name", CASES)
def test_text_is_encoded_as_transformers_does(tmp_path: Path, name: str) -> None:
    files = CASES[name]
    size = write(tmp_path, **files)
    assert size == SIZE
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    backend = load_backend(tmp_path / "tokenizer.json")
    assert backend.encode(TEXT).ids == reference.encode(TEXT, add_special_tokens=False)
    ours = {text: backend.token_to_id(text) for text in ("<tool>", "</tool>", "<extra>")}
    theirs = {text: reference.backend_tokenizer.token_to_id(text) for text in ours}
    assert ours == theirs
    assert special_token_ids(backend) == special_token_ids(reference.backend_tokenizer)
    ids = backend.encode(TEXT).ids
    assert backend.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_added_tokens_of_the_older_file(tmp_path: Path) -> None:
    size = write(tmp_path, added_tokens={"<tool>": SIZE, "</tool>": SIZE + 1})
    backend = load_backend(tmp_path / "tokenizer.json")
    assert size == SIZE
    assert [backend.token_to_id(text) for text in ("<tool>", "</tool>")] == [SIZE, SIZE + 1]
    assert backend.encode("<tool>").ids == [SIZE]


def test_an_id_that_cannot_be_given_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, tokenizer_config=decoder(SIZE + 7, entry("<tool>")))
    load_backend(tmp_path / "tokenizer.json")
    assert "another id" in caplog.text


@pytest.mark.parametrize("content", [{"added_tokens_decoder": {"x": {}}}, {"added_tokens_decoder": [1]}])
def test_what_cannot_be_read_is_told_with_its_file(tmp_path: Path, content: dict[str, Any]) -> None:
    write(tmp_path, tokenizer_config=content)
    with pytest.raises(ModelFileBroken, match="tokenizer_config"):
        load_backend(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("prefix", ["x", "yarn", "é", "\U0001f600"])
def test_a_prefix_that_merges_lack_does_not_end_the_process(tmp_path: Path, prefix: str) -> None:
    write(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["model"]["continuing_subword_prefix"] = prefix
    file.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    with pytest.raises(ModelFileBroken, match=f"not all merges have the prefix '{prefix}'"):
        load_backend(file)


def test_a_prefix_that_merges_have(tmp_path: Path) -> None:
    model = {
        "type": "BPE",
        "continuing_subword_prefix": "##",
        "vocab": {"a": 0, "##b": 1, "ab": 2},
        "merges": [["a", "##b"]],
    }
    empty = dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    content = {"version": "1.0", "added_tokens": [], **empty, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_backend(tmp_path / "tokenizer.json").encode("ab").ids == [2]


def test_a_panic_of_the_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Panicking:
        @staticmethod
        def from_file(_: str) -> None:
            raise PanicException("range end index 18446744073709551615 out of range")

    write(tmp_path)
    monkeypatch.setattr(backend_module, "Backend", Panicking)
    with pytest.raises(ModelFileBroken, match="not a tokenizer: range end index"):
        load_backend(tmp_path / "tokenizer.json")


def test_older_files_do_not_count_beside_the_newer_key(tmp_path: Path) -> None:
    """As for transformers, which then reads neither added_tokens.json nor special_tokens_map.json."""
    files = {
        "added_tokens": {"<tool>": SIZE},
        "special_tokens_map": {"additional_special_tokens": ["<extra>"]},
    }
    write(tmp_path, **files, tokenizer_config={"added_tokens_decoder": {}})  # type: ignore[arg-type]
    backend = load_backend(tmp_path / "tokenizer.json")
    assert backend.token_to_id("<tool>") is None
    assert backend.encode(TEXT).ids == transformers.AutoTokenizer.from_pretrained(tmp_path).encode(
        TEXT, add_special_tokens=False
    )
