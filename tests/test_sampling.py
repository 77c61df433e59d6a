"""Sampling parameters: normal forms, and values that are refused by name."""

from __future__ import annotations

import enum
import math
from decimal import Decimal
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
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


class Count(enum.IntEnum):
    """A whole number by another name."""

    TWO = 2


@pytest.mark.parametrize(
    ("name", "value", "converted"),
    [
        ("temperature", np.float64(0.5), 0.5), ("temperature", np.float32(0.5), 0.5),
        ("temperature", torch.tensor(0.5), 0.5), ("temperature", Decimal("0.5"), 0.5), ("top_p", 1, 1.0),
        ("n", np.int64(2), 2), ("n", Count.TWO, 2), ("n", torch.tensor(2), 2), ("seed", np.uint8(7), 7),
        ("max_tokens", np.int32(5), 5), ("max_new_tokens", np.int32(5), 5), ("priority", np.int16(-3), -3),
        ("timeout", np.float64(2), 2.0), ("ignore_eos", np.True_, True),
        ("stop_token_ids", np.array([3, 4]), (3, 4)), ("stop_token_ids", torch.tensor([3, 4]), (3, 4)),
        ("stop_token_ids", [np.int64(3), 4], (3, 4)), ("stop_token_ids", range(2), (0, 1)),
        ("logit_bias", {np.int64(3): np.float32(0.5)}, {3: 0.5}), ("logit_bias", {3: 1}, {3: 1.0}),
        ("stop", np.array(["a", "b"]), ("a", "b")),
    ],
)  # fmt: skip
def test_other_types_are_converted(name: str, value: Any, converted: object) -> None:
    params = SamplingParams(**{name: value})
    assert getattr(params, name) == converted
    # A worker reads it, too: msgpack knows Python's own types only.
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", None), ("temperature", None), ("temperature", [0.5]), ("temperature", np.array([0.5])),
        ("temperature", 10**400), ("n", torch.tensor([1, 2])), ("n", torch.tensor(1.0)), ("top_k", 10**30),
        pytest.param("min_tokens", 10**5000, id="digits"),
        ("max_tokens", 2**63), ("ignore_eos", "no"), ("skip_special_tokens", None),
        ("stop", 5), ("stop", b"END"), ("stop", ["a", "\ud800"]), ("stop", "\udfff"),
        ("stop_token_ids", 5), ("stop_token_ids", [300, True]), ("stop_token_ids", "12"),
        ("stop_token_ids", {3: 4}), ("stop_token_ids", np.array([[1]])), ("stop_token_ids", [2**63]),
        ("logit_bias", [(1, 2)]), ("logit_bias", {True: 1}), ("logit_bias", {1: "1"}),
        ("logit_bias", {1: None}),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300
    str(caught.value).encode()


def test_a_choice_has_no_stop_strings_and_one_choice_scores_the_prompt() -> None:
    params = SamplingParams(n=3, stop="END", prompt_logprobs=2, logit_bias={3: 1.0})
    first, second = params.choice(5, scored=True), params.choice(6, scored=False)
    assert (first.n, first.seed, first.stop_strings, first.prompt_logprobs) == (1, 5, (), 2)
    assert (second.n, second.seed, second.stop_strings, second.prompt_logprobs) == (1, 6, (), None)
    assert second.logit_bias == {3: 1.0}
    assert (params.n, params.stop_strings) == (3, ("END",))


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
