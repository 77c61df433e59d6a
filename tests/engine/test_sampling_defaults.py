"""The sampling parameters that a model's generation_config.json recommends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trio.testing import MockClock

from tests.support.engine import Open, collect, tokens_of
from ullm.config import EngineConfig
from ullm.engine.sampling_defaults import NOT_APPLIED, SamplingDefaults, not_applied, read_sampling_defaults
from ullm.errors import ModelFileBroken, ReloadFailed
from ullm.hub import LocalModel
from ullm.sampling import SamplingParams
from ullm.testing import local_model, write_scripted_model

LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}


def defaults(content: dict[str, Any], **options: Any) -> SamplingDefaults:
    model = LocalModel("m", Path("/m"), {}, Path("/m"), content)
    return read_sampling_defaults(EngineConfig(model="m", **options), model)


def test_they_are_those_of_the_file_as_vllm_reads_them() -> None:
    assert defaults(LLAMA) == SamplingDefaults(temperature=0.6, top_p=0.9)
    every = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05}
    assert defaults({**every, "max_new_tokens": 2048}) == SamplingDefaults(**every, max_tokens=2048)
    assert defaults({}) == SamplingDefaults()
    assert defaults({"top_k": None, "max_length": 20}) == SamplingDefaults()


def test_they_are_not_read_with_vllm() -> None:
    assert defaults(LLAMA, generation_config="vllm") == SamplingDefaults()
    assert defaults({"temperature": "warm"}, generation_config="vllm") == SamplingDefaults()


@pytest.mark.parametrize("value", ["warm", -1, [0.5], {}, True])
def test_what_no_request_could_have_is_refused(value: Any) -> None:
    with pytest.raises(
        ModelFileBroken, match=r"generation_config\.json: temperature must be .*vllm to ignore"
    ):
        defaults({"temperature": value})


def test_a_request_overrides_them_one_by_one() -> None:
    own = SamplingDefaults(temperature=0.6, top_k=20, repetition_penalty=1.1, max_tokens=9)
    assert own.params() == SamplingParams(temperature=0.6, top_k=20, repetition_penalty=1.1)
    assert own.params(temperature=0.0, top_k=0, max_tokens=3) == SamplingParams(
        temperature=0, repetition_penalty=1.1, max_tokens=3
    )


async def test_max_new_tokens_counts_where_a_request_has_no_limit(
    clock: MockClock, opened: Open, tmp_path: Path
) -> None:
    folder = write_scripted_model(tmp_path / "short", context_len=64)
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    async with opened(find_model=lambda config: local_model(folder), context_len=64) as (engine, _):
        greedy = SamplingParams(temperature=0)
        assert len(tokens_of(await collect(engine, params=greedy))) == 7
        assert (
            len(tokens_of(await collect(engine, params=replace(greedy, max_tokens=12, max_new_tokens=12))))
            == 12
        )
        assert len(tokens_of(await collect(engine, params=replace(greedy, min_tokens=9)))) == 9
        long_prompt = [300] * 60  # the context ends first
        assert len(tokens_of(await collect(engine, long_prompt, greedy))) == 4


async def test_a_reload_changes_them_or_is_refused(clock: MockClock, opened: Open, tmp_path: Path) -> None:
    second, broken = (write_scripted_model(tmp_path / name) for name in ("second", "broken"))
    (second / "generation_config.json").write_text(json.dumps(LLAMA))
    (broken / "generation_config.json").write_text('{"top_p": 7}')
    async with opened(find_model=lambda config: local_model(Path(config.model))) as (engine, _):
        assert engine.sampling_defaults == SamplingDefaults()
        await engine.reload(model=str(second))
        assert engine.sampling_defaults == SamplingDefaults(temperature=0.6, top_p=0.9)
        with pytest.raises(ReloadFailed, match="top_p must be a number from 0 to 1, got 7"):
            await engine.reload(model=str(broken))
        assert engine.sampling_defaults.temperature == 0.6


def test_what_a_generation_config_has_beside_is_named() -> None:
    content = {
        **{
            "temperature": 0.6,
            "do_sample": True,
            "num_beams": 1,
            "typical_p": 1.0,
            "forced_eos_token_id": None,
        },
        **{"suppress_tokens": [3], "no_repeat_ngram_size": 2, "brand_new": 1, "bad_words_ids": []},
    }
    assert not_applied(content) == ["brand_new", "no_repeat_ngram_size", "suppress_tokens"]


def test_every_key_that_transformers_knows_is_known() -> None:
    from transformers import GenerationConfig

    content = {key: "other" for key in GenerationConfig().to_dict()}
    assert not_applied(content) == sorted(NOT_APPLIED)
