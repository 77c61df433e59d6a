"""Configs of models that transformers computes, and tokenizers' files, with keys dropped, nested and retyped.

They are what transformers makes of them, or refused in one line.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.model.loading.test_mutated_configs import keys_of, mutate, ours, theirs, values
from tests.model.model_fixtures import SHAPE, config
from ullm.actors.tokenizer import TokenizerActor
from ullm.engine.sampling_defaults import read_sampling_defaults
from ullm.errors import UllmError
from ullm.hub import resolve
from ullm.model.loading.checkpoint import read_checkpoint
from ullm.testing import tiny_tokenizer

FAMILIES: dict[str, dict[str, Any]] = {
    "GPTNeoX": {},
    "Phi": {"partial_rotary_factor": 0.5},
    "Starcoder2": {"sliding_window": 6},
}
TEXT = "a <|im_end|> Paris is  the capital <tool>x</tool> of\tFrance <extra> Größe"
FILES = ("tokenizer_config", "special_tokens_map", "added_tokens", "tokenizer")
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
SAMPLING = ("temperature", "top_k", "top_p", "eos_token_id", "x")
FEW: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow],
    "database": None,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for family, changes in FAMILIES.items():
        folders[family] = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        made = getattr(transformers, f"{family}Config")(**SHAPE, **changes)
        getattr(transformers, f"{family}ForCausalLM")(made).save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    size = tiny_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    content = json.loads(file.read_text("utf-8"))
    content["added_tokens_decoder"] = {str(size): {"content": "<tool>", **plain}}
    file.write_text(json.dumps(content), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|im_end|>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": size}))
    return folder


def changed(folder: Path, name: str, target: Path, data: st.DataObject) -> Path:
    """Copy a folder, and change one or two keys of a file in it."""
    copy = Path(shutil.copytree(folder, target / "model"))
    content = json.loads((copy / name).read_text("utf-8"))
    for _ in range(data.draw(st.integers(1, 2), label="changes")):
        if keys_of(content):
            mutate(content, data)
    (copy / name).write_text(json.dumps(content), "utf-8")
    return copy


def attempt(work: Callable[[], Any]) -> Any:
    """Do something; return what it returns, or the line that says why not."""
    try:
        return work()
    except UllmError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 1000
    return line


def check_config(family: str, models: dict[str, Path], target: Path, data: st.DataObject) -> None:
    folder = changed(models[family], "config.json", target, data)
    found = ours(folder)
    if isinstance(found, str):
        assert "\n" not in found
        assert len(found) < 1000
    elif (expected := theirs(folder)) is not None:
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def encoded(folder: Path) -> list[int]:
    """Encode a text as ullm does, and read all else that the front end reads."""
    actor = TokenizerActor(resolve(config(folder, load_format="dummy")))
    actor.load()
    actor.describe()
    return actor._encode(TEXT, True, "prompt")


def expected_ids(folder: Path) -> list[int] | None:
    """Return transformers' ids, or None if it does not read the files."""
    try:
        ids: list[int] = transformers.AutoTokenizer.from_pretrained(folder).encode(TEXT)
        return ids
    except Exception:  # whatever its code raises
        return None


def check_tokenizer(name: str, tokenizer: Path, target: Path, data: st.DataObject) -> None:
    folder = changed(tokenizer, f"{name}.json", target, data)
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )
    found = attempt(lambda: encoded(folder))
    if not isinstance(found, str) and (expected := expected_ids(folder)) is not None:
        assert found == expected


@pytest.fixture(autouse=True)
def _silent() -> Any:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, **FEW)
@given(data=st.data())
def test_a_few_configs(
    family: str, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    check_config(family, models, tmp_path_factory.mktemp("mutated"), data)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=80, **FEW)
@given(data=st.data())
def test_configs(
    family: str, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    check_config(family, models, tmp_path_factory.mktemp("mutated"), data)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=8, **FEW)
@given(data=st.data())
def test_a_few_tokenizers(
    name: str, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    check_tokenizer(name, tokenizer, tmp_path_factory.mktemp("mutated"), data)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@settings(max_examples=80, **FEW)
@given(data=st.data())
def test_tokenizers(
    name: str, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    check_tokenizer(name, tokenizer, tmp_path_factory.mktemp("mutated"), data)


@settings(max_examples=60, **FEW)
@given(
    content=st.dictionaries(st.sampled_from(("temperature", "top_k", "top_p", "eos_token_id", "x")), values)
)
def test_generation_configs(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    hf = {**LLAMA, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "generation_config.json").write_text(json.dumps(content))
    tiny_tokenizer(folder)
    options = config(folder, load_format="dummy")
    attempt(lambda: read_sampling_defaults(options, resolve(options)))
    ends = attempt(lambda: read_checkpoint(folder, options, torch.device("cpu")).eos_token_ids)
    if not isinstance(ends, str):
        named = content.get("eos_token_id")
        assert set(ends) >= set(named if isinstance(named, list) else [2 if named is None else named])
