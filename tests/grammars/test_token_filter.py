"""Tokens that are allowed, and words that are not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ullm.grammars.matcher import Mask
from ullm.grammars.token_filter import TokenFilter

SIZE = 70


def tokens(mask: Mask) -> set[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return {int(token) for token in np.flatnonzero(bits) if token < SIZE}


def fresh(rows: int | None = None) -> Mask:
    return np.zeros(3 if rows is None else (rows, 3), np.int32)


def next_tokens(matcher: TokenFilter) -> set[int]:
    mask = fresh()
    matcher.fill(mask)
    return tokens(mask)


def test_only_what_is_allowed() -> None:
    assert next_tokens(TokenFilter([0, 31, 32, 69], [])) == {0, 31, 32, 69}


def test_the_last_token_of_a_word_where_the_others_precede_it() -> None:
    matcher = TokenFilter([], [[5], [7, 8, 31], [8, 32]])
    every = set(range(SIZE))
    assert next_tokens(matcher) == every - {5}
    matcher.consume([7])
    assert next_tokens(matcher) == every - {5}
    matcher.consume([8])
    assert next_tokens(matcher) == every - {5, 31, 32}
    matcher.consume([9])
    assert next_tokens(matcher) == every - {5}


def test_the_place_is_a_function_of_the_tokens() -> None:
    words = [[1, 2, 3], [2, 4]]
    once, piecewise = TokenFilter([], words), TokenFilter([], words)
    once.consume([9, 9, 1, 2])
    for token in (9, 9, 1, 2):
        piecewise.consume([token])
    assert next_tokens(once) == next_tokens(piecewise) == set(range(SIZE)) - {3, 4}


def test_ahead_of_a_draft() -> None:
    matcher = TokenFilter([1, 2, 3], [[1, 2]])
    masks = fresh(3)
    matcher.fill_ahead([1, 3], masks)
    assert [tokens(mask) for mask in masks] == [{1, 2, 3}, {1, 3}, {1, 2, 3}]
    assert next_tokens(matcher) == {1, 2, 3}, "a draft changes nothing"


class OnlyFour:
    """A grammar that wants token 4."""

    error = ""

    def __init__(self) -> None:
        self.consumed: list[int] = []

    def consume(self, token_ids: Sequence[int]) -> None:
        self.consumed += token_ids

    def fill(self, mask: Mask) -> None:
        mask.fill(0)
        mask[0] = 1 << 4

    def fill_ahead(self, draft: Sequence[int], masks: Mask) -> None:
        for mask in masks:
            self.fill(mask)


def test_beside_a_grammar() -> None:
    grammar = OnlyFour()
    matcher = TokenFilter([], [[9, 4]], grammar)
    assert next_tokens(matcher) == {4}
    assert matcher.error == ""
    matcher.consume([9])
    assert grammar.consumed == [9]
    next_tokens(matcher)
    assert "may come next" in matcher.error
