"""Models that run through transformers' code: no key of their config.json is left unread by accident."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from tests.model.model_fixtures import SHAPE, LogitsModel
from tests.model.outcomes import known_outcomes
from ullm.model.architectures.transformers_keys import keys_without_effect

PLAIN = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}


def save(folder: Path, **config: object) -> None:
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**PLAIN)).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def test_unknown_keys_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path)
    LogitsModel(tmp_path)
    assert "no effect" not in caplog.text
    save(
        tmp_path, sliding_window=7, attention_multiplier=0.3, query_scale=None, rotary_pct=0.5, use_cache=True
    )
    LogitsModel(tmp_path)
    line = f"{tmp_path / 'config.json'}: keys that have no effect here: attention_multiplier, sliding_window"
    assert line in [record.getMessage() for record in caplog.records]


def test_older_names_that_a_class_reads_are_known() -> None:
    config = CONFIG_MAPPING["gpt_neox"]()
    assert keys_without_effect({"rotary_emb_base": 10000, "rotary_pct": 0.25, "kind": "x"}, config) == [
        "kind"
    ]


def test_keys_of_inner_objects_are_named() -> None:
    config = CONFIG_MAPPING["gemma3"]()
    hf = {"text_config": {"head_dim": 8, "unheard_of": 1}, "vision_config": {"odd": 2}, "other": 3}
    assert keys_without_effect(hf, config) == ["other", "text_config.unheard_of", "vision_config.odd"]


RUN = sorted(kind for kind, outcome in known_outcomes().items() if outcome.verdict == "transformers")


@pytest.mark.slow
def test_the_keys_that_classes_save_are_known() -> None:
    """Of all architectures that run so: what save_pretrained writes leads to no warning."""
    logging.disable(logging.WARNING)
    try:
        named = {}
        for kind in RUN:
            config = CONFIG_MAPPING[kind]()
            if unread := keys_without_effect(config.to_dict(), config):
                named[kind] = unread
    finally:
        logging.disable(logging.NOTSET)
    assert len(RUN) > 50
    assert named == {}


def test_tensors_without_a_place_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {f"gpt_neox.layers.0.{name}": torch.ones(3) for name in ("gate.weight", "attn.bias")}
    save_file(tensors | more, tmp_path / "model.safetensors", {"format": "pt"})
    LogitsModel(tmp_path)
    assert "1 tensors have no place in the model and are not used: gpt_neox.layers.0.gate" in caplog.text
