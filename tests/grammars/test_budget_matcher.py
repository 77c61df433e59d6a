"""The budget of thinking: a function of the answer's tokens, beside other constraints, ahead of drafts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ullm.grammars.matcher import Mask
from ullm.grammars.thinking import ThinkingTokens
from ullm.grammars.thinking_budget import ThinkingBudget
from ullm.grammars.token_filter import TokenFilter

BEGIN, END, SIZE = 40, 33, 70
FREE = set(range(SIZE))


def tokens(mask: Mask) -> set[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return {int(token) for token in np.flatnonzero(bits) if token < SIZE}


def next_tokens(matcher: ThinkingBudget) -> set[int]:
    mask = np.zeros(3, np.int32)
    matcher.fill(mask)
    return tokens(mask)


def budget(size: int, *, begun: bool = True, rest: TokenFilter | None = None) -> ThinkingBudget:
    return ThinkingBudget(ThinkingTokens(BEGIN, END, begun), size, rest)


def test_the_end_is_forced_after_the_budget_and_nothing_after_that() -> None:
    matcher = budget(2)
    for token in (5, 6):
        assert next_tokens(matcher) == FREE
        matcher.consume([token])
    assert next_tokens(matcher) == {END}
    matcher.consume([END])
    for token in (BEGIN, 7, 7, 7):
        assert next_tokens(matcher) == FREE, "thinking happens once"
        matcher.consume([token])


def test_it_counts_from_the_beginning_of_the_thinking() -> None:
    matcher = budget(1, begun=False)
    for token in (9, 9, BEGIN, 9):
        assert next_tokens(matcher) == FREE
        matcher.consume([token])
    assert next_tokens(matcher) == {END}


def test_no_budget_at_all() -> None:
    assert next_tokens(budget(0)) == {END}
    assert next_tokens(budget(0, begun=False)) == FREE


def test_thinking_that_ends_by_itself() -> None:
    matcher = budget(3)
    matcher.consume([5, END, 6, 7, 8])
    assert next_tokens(matcher) == FREE


@pytest.mark.parametrize("begun", [True, False])
def test_the_state_is_a_function_of_the_tokens(begun: bool) -> None:
    """However they come: one by one, all at once as after a resumption, or as a draft."""
    for answer in itertools.product((5, BEGIN, END), repeat=4):
        once, piecewise, ahead = (budget(2, begun=begun) for _ in range(3))
        masks = np.zeros((5, 3), np.int32)
        ahead.fill_ahead(answer, masks)
        for count, token in enumerate(answer):
            assert next_tokens(piecewise) == tokens(masks[count])
            piecewise.consume([token])
        once.consume(answer)
        assert next_tokens(once) == next_tokens(piecewise) == tokens(masks[4])
        assert next_tokens(ahead) == next_tokens(budget(2, begun=begun)), "a draft changes nothing"


def test_beside_other_constraints() -> None:
    matcher = budget(1, rest=TokenFilter([5, 6, END], []))
    assert next_tokens(matcher) == {5, 6, END}
    matcher.consume([5])
    assert next_tokens(matcher) == {END}
    assert matcher.error == ""
    matcher = budget(0, rest=TokenFilter([5, 6], []))
    assert next_tokens(matcher) == {5, 6}, "what forbids the end is right"
    masks = np.zeros((2, 3), np.int32)
    matcher.fill_ahead([5], masks)
    assert [tokens(mask) for mask in masks] == [{5, 6}, {5, 6}]
