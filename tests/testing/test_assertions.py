"""What the assertions let pass, and what they say of the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ullm.engine.output import Output
from ullm.testing import assert_finished_once, assert_no_token_lost, assert_same_text

TOKENS = [5, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("got", "said"),
    [
        ([], "8 tokens are missing at token 0 of 8 (0 came)"),
        ([5, 6, 7], "5 tokens are missing at token 3 of 8 (3 came)"),
        ([*TOKENS, 13], "1 tokens too many at token 8 of 8 (9 came)"),
        ([5, 6, 9, 10, 11, 12], "2 tokens are missing at token 2 of 8 (6 came)"),
        ([5, 6, 7, 6, 7, 8, 9, 10, 11, 12], "2 tokens too many at token 3 of 8 (10 came)"),
        ([5, 6, 7, 99, 9, 10, 11, 12], "another token at token 3 of 8 (8 came)"),
        ([5, 7, 6, 8, 9, 10, 11, 12], "another token at token 1 of 8 (8 came)"),
        ([5, 6], "6 tokens are missing at token 2 of 8 (2 came)"),
    ],
)
def test_lost_tokens_are_named(got: list[int], said: str) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_no_token_lost(TOKENS, got)
    assert str(caught.value).startswith(said)


def test_the_same_tokens_pass() -> None:
    assert_no_token_lost(TOKENS, tuple(TOKENS))
    assert_no_token_lost([], [])


def test_texts() -> None:
    assert_same_text("Größe", "Größe")
    with pytest.raises(AssertionError, match=r"differ at character 3 .* 'Größe', got 'Grösse'"):
        assert_same_text("Größe", "Grösse")
    with pytest.raises(AssertionError, match=r"character 3 \(5 expected, 3 came\)"):
        assert_same_text("Größe", "Grö")


def output(reason: str | None = None, index: int = 0) -> Output:
    return Output(index, "x", [1], finish_reason=reason)


def chunk(reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": "x", "finish_reason": reason}]}


def parsed(reason: str | None = None, index: int = 0) -> SimpleNamespace:
    return SimpleNamespace(choices=[SimpleNamespace(index=index, finish_reason=reason)])


@pytest.mark.parametrize("event", [output, chunk, parsed])
def test_one_end_each(event: Any) -> None:
    assert_finished_once([event(), event("stop")], "stop")
    assert_finished_once([event(), event("stop", 1), event(), event("length")], choices=2)
    with pytest.raises(AssertionError, match="1 choices were asked for, and 0 ended"):
        assert_finished_once([event()])
    with pytest.raises(AssertionError, match="choice 0 went on in event 1, after it had ended with 'stop'"):
        assert_finished_once([event("stop"), event()])
    with pytest.raises(AssertionError, match="after it had ended"):
        assert_finished_once([event("stop"), event("stop")])
    with pytest.raises(AssertionError, match=r"expected finish reason 'length', got \{0: 'abort'\}"):
        assert_finished_once([event("abort")], "length")


def test_a_chunk_of_usage_has_no_choice() -> None:
    assert_finished_once([chunk("stop"), {"choices": [], "usage": {"total_tokens": 3}}])
