"""Sampling parameters: normal forms, and values that are refused by name."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullm.errors import InvalidParameter
from ullm.sampling import MAX_SEED, SamplingParams


def test_defaults() -> None:
    params = SamplingParams()
    assert not params.greedy
    assert params.max_tokens is None
    assert params.stop_strings == ()


def test_two_names_of_max_tokens() -> None:
    assert SamplingParams(max_new_tokens=5).max_tokens == 5
    assert SamplingParams(max_tokens=5).max_new_tokens == 5
    assert SamplingParams(max_tokens=5, max_new_tokens=5).max_tokens == 5
    with pytest.raises(InvalidParameter, match="two names"):
        SamplingParams(max_tokens=5, max_new_tokens=6)


def test_normal_forms() -> None:
    params = SamplingParams(stop="END", top_k=-1, stop_token_ids=[3], logit_bias={5: 1})  # type: ignore[arg-type]
    assert params.stop_strings == ("END",)
    assert params.top_k == 0
    assert params.stop_token_ids == (3,)
    assert SamplingParams(stop=None).stop_strings == ()  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")  # type: ignore[arg-type]
    assert SamplingParams(temperature=0).greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", 129), ("n", 1.5), ("n", True),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
        ("top_p", 0), ("top_p", 1.1), ("top_p", math.nan),
        ("top_k", -2), ("top_k", 1.5), ("min_p", -0.1), ("min_p", 1.1),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.0), ("min_tokens", -1),
        ("repetition_penalty", 0), ("repetition_penalty", -1),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("seed", MAX_SEED), ("seed", -MAX_SEED - 1), ("seed", 0.5),
        ("logprobs", -1), ("logprobs", 21), ("prompt_logprobs", 21),
        ("stop", [""]), ("stop", [1]), ("stop", ["x"] * 17),
        ("stop_token_ids", [-1]), ("stop_token_ids", ["1"]),
        ("logit_bias", {1: 101}), ("logit_bias", {1: math.nan}),
        ("logit_bias", {-1: 0}), ("logit_bias", {"1": 0}),
        ("timeout", -1), ("timeout", math.nan), ("priority", 2**31),
    ],
)  # fmt: skip
def test_refusals_name_the_field(name: str, value: object) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(InvalidParameter, match="min_tokens is 5, more than max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


@given(
    st.builds(
        SamplingParams,
        n=st.integers(1, 128),
        temperature=st.floats(0, 100),
        top_p=st.floats(0.01, 1),
        top_k=st.integers(-1, 1000),
        max_tokens=st.none() | st.integers(1, 10**6),
        stop=st.lists(st.text(min_size=1), max_size=16),
        logit_bias=st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100)),
        seed=st.none() | st.integers(-MAX_SEED, MAX_SEED - 1),
    )
)
def test_round_trip_through_a_frame(params: SamplingParams) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
