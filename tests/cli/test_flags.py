"""Flags out of dataclass fields, and the page that documents them."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from ullm.cli import options_doc as configdoc
from ullm.cli.flags import (
    build,
    docstring_arguments,
    engine_options,
    sampling_options,
    sampling_params,
    server_options,
    with_options,
)
from ullm.config import EngineConfig, ServerConfig
from ullm.errors import ConfigError
from ullm.hosting.config_sources import SAMPLING_FIELDS
from ullm.sampling import SamplingParams


def test_every_field_is_an_option_once() -> None:
    names = [option.name for option in engine_options()]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(EngineConfig))
    assert [o.name for o in server_options()] == [field.name for field in dataclasses.fields(ServerConfig)]


def test_every_sampling_field_is_explained() -> None:
    helps = docstring_arguments(SamplingParams)
    assert set(helps) == {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(SAMPLING_FIELDS) <= set(helps)
    assert helps["repetition_penalty"].endswith("section 4.1).")


def test_signature_has_own_and_derived_parameters_and_only_given_ones_arrive() -> None:
    seen: dict[str, Any] = {}

    @with_options(engine_options())
    def command(*, own: int = 1, **given: Any) -> int:
        seen.update(given)
        return own

    parameters = inspect.signature(command).parameters
    assert next(iter(parameters)) == "own"
    assert parameters["max_bs"].default == EngineConfig().max_bs
    assert command(own=3, max_bs=4) == 3
    assert seen == {"max_bs": 4}


def test_api_keys_are_repeated_and_keep_their_commas() -> None:
    parameter = next(o for o in server_options() if o.name == "api_key").parameter()
    assert "list[str]" in str(parameter.annotation)
    assert build(ServerConfig, {"api_key": ["a,b"]}) == ServerConfig(api_key="a,b")
    assert build(ServerConfig, {"api_key": ["a", "b"]}).api_keys == ("a", "b")


def test_a_flag_wins_over_a_variable_and_that_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULLM_MAX_BS", "7")
    monkeypatch.setenv("ULLM_TP_SIZE", "2")
    config = build(EngineConfig, {"max_bs": 5, "port": 1})
    assert (config.max_bs, config.tp_size, config.replicas) == (5, 2, 1)


@pytest.mark.parametrize("name", ["ULLM_MAX_BS", "ULLM_DEVICE_IDS", "ULLM_MODEL", "ULLM_ADMIN_KEY"])
def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    assert build(EngineConfig, {}) == EngineConfig()
    assert build(ServerConfig, {}) == ServerConfig()


def test_lists_repeat_or_are_separated_by_commas() -> None:
    assert build(EngineConfig, {"device_ids": ["0, 1", "2"]}).device_ids == (0, 1, 2)
    assert build(EngineConfig, {"served_model_name": ["a,b", "c"]}).model_names == ("a", "b", "c")
    assert build(EngineConfig, {"device_ids": "0, 1"}).device_ids == (0, 1)
    assert build(ServerConfig, {"cors_origins": "http://a,http://b"}).cors_origins == ("http://a", "http://b")
    with pytest.raises(ConfigError, match=r"--device-ids 0,x: .*separate values by commas"):
        build(EngineConfig, {"device_ids": "0,x"})


def test_sampling_params() -> None:
    given = {"stop": ["a,b", "c"], "stop_token_ids": "1,2", "max_tokens": 3, "model": "x"}
    params = sampling_params(given, {"temperature": 0.0, "max_tokens": 9})
    assert params.stop_strings == ("a,b", "c")
    assert params.stop_token_ids == (1, 2)
    assert (params.temperature, params.max_tokens) == (0.0, 3)
    with pytest.raises(ConfigError, match="top_p"):
        sampling_params({"top_p": 3.0}, {})


def test_defaults_of_a_command_are_shown() -> None:
    options = {option.name: option for option in sampling_options({"temperature": 0.5})}
    assert options["temperature"].default == 0.5
    assert options["top_p"].default == 1.0


def test_the_configuration_page_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configdoc.main([str(tmp_path / "page.md")])
    configdoc.main([])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == capsys.readouterr().out
