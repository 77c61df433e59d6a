"""No key of a config.json is left unread by accident."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from tests.model.model_fixtures import LogitsModel, save_tiny
from ullm.model.architectures.registry import MODEL_TYPES, NATIVE
from ullm.model.loading.config_keys import ReadKeys


@pytest.mark.parametrize("name", NATIVE)
def test_every_key_that_transformers_knows_is_read_or_without_effect(name: str) -> None:
    """Also where all keys have values, so that each would be named."""
    config = CONFIG_MAPPING[MODEL_TYPES[name]]().to_dict()
    keys = ReadKeys({key: 1 if value in (None, False) else value for key, value in config.items()})
    keys |= {"use_bidirectional_attention": False, "layer_types": None, "no_rope_layers": None}
    keys |= {"rope_parameters": None, "mlp_only_layers": None}
    whole = ReadKeys(keys)
    NATIVE[name].read_config(whole, 64)
    assert whole.unread() == []


def test_an_unknown_key_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny(tmp_path, "qwen3")
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    LogitsModel(tmp_path)
    assert "no effect" not in caplog.text
    file.write_text(json.dumps(content | {"attention_multiplier": 0.3, "query_scale": 2, "nothing": None}))
    LogitsModel(tmp_path)
    assert f"{file}: keys that have no effect here: attention_multiplier, query_scale" in caplog.text


def test_what_is_made_of_a_configuration_remembers_too() -> None:
    keys = ReadKeys({"a": 1, "b": 2, "c": 3, "d": None})
    assert (keys | {"a": 4}).get("a") == 4
    assert keys["b"] == 2
    assert keys.unread() == ["c"]
