"""Configs with keys dropped, added, nested and retyped: what transformers computes, or one line."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.model.model_fixtures import LogitsModel, random_tokens, save_tiny
from ullm.errors import UllmError

NAMES = ["llama", "llama-head-dim", "mistral", "qwen2-windows", "qwen3-bias"]
TOKENS = random_tokens(12, 5)
HARMLESS = ("initializer_range", "use_cache", "transformers_version", "bos_token_id", "pad_token_id")

values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 7, 64, 1 << 20, 1 << 40, 10**30]),
    st.sampled_from([0.0, 0.5, -1.0, 1e-5, 1e30, float("inf"), float("nan")]),
    st.sampled_from(["", "2", "1e-05", "relu", "silu", "gelu", "yarn", "linear", "llama", "float16"]),
    st.sampled_from([[], [1], [None], ["full_attention"], {}, {"rope_type": "linear"}, {"factor": None}]),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in folders.items():
        save_tiny(folder, name)
    return folders


def keys_of(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the paths of all keys, those of nested objects as well."""
    nested = {key: value for key, value in config.items() if isinstance(value, dict)}
    inner = [(key, each) for key, value in nested.items() for each in value]
    return [*((key,) for key in sorted(config) if key not in HARMLESS), *sorted(inner)]


def mutate(config: dict[str, Any], data: st.DataObject) -> None:
    """Change one key: drop it, give it another value or type, wrap it, or move it into another object."""
    path = data.draw(st.sampled_from(keys_of(config)), label="key")
    inner = config if len(path) == 1 else config[path[0]]
    match data.draw(st.sampled_from(["drop", "set", "text", "list", "object", "move"]), label="how"):
        case "drop":
            del inner[path[-1]]
        case "set":
            inner[path[-1]] = data.draw(values, label="value")
        case "text":
            inner[path[-1]] = str(inner[path[-1]])
        case "list":
            inner[path[-1]] = [inner[path[-1]]]
        case "object":
            inner[path[-1]] = {path[-1]: inner[path[-1]]}
        case "move":
            place = data.draw(st.sampled_from(["rope_parameters", "rope_scaling", "text_config"]), label="to")
            target = config.get(place)
            config[place] = {**(target if isinstance(target, dict) else {}), path[-1]: inner.pop(path[-1])}


def ours(folder: Path) -> torch.Tensor | str:
    """Return the logits of a prompt, or why the model is refused."""
    try:
        model = LogitsModel(folder)
        model.add(0, TOKENS, [0, 1, 2])
        return model.step((0, 0, len(TOKENS)))[0]
    except UllmError as error:
        return str(error)


def theirs(folder: Path) -> torch.Tensor | None:
    """Return transformers' logits, or None if it does not run the model."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits: torch.Tensor = model(torch.tensor([TOKENS]), use_cache=False).logits[0]
            return logits
    except Exception:  # whatever its code raises for this config
        return None


@pytest.mark.parametrize("name", NAMES)
@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow],
    database=None,
)  # fmt: skip
@given(data=st.data())
def test_a_mutated_config_is_computed_as_transformers_does_or_refused(
    name: str, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    logging.disable(logging.WARNING)
    folder = Path(shutil.copytree(models[name], tmp_path_factory.mktemp("mutated") / "model"))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for _ in range(data.draw(st.integers(1, 2), label="changes")):
        mutate(config, data)
    file.write_text(json.dumps(config))
    try:
        found = ours(folder)
        if isinstance(found, str):
            assert "\n" not in found
            assert len(found) < 1000
        elif (expected := theirs(folder)) is not None:
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder)
