"""A matcher for tokens that a request allows or forbids, alone or beside a grammar."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np

from ullm.errors import NoTokenAllowed
from ullm.grammars.matcher import Mask


class Matcher(Protocol):
    """Where an answer is, and which tokens may come next; see `ullm.grammars.matcher.GrammarMatcher`."""

    @property
    def error(self) -> str:
        """What has gone wrong for good; empty if nothing has."""

    def consume(self, token_ids: Sequence[int]) -> None:
        """Go on over tokens of the answer."""

    def fill(self, mask: Mask) -> None:
        """Write which tokens may come next."""

    def fill_ahead(self, draft: Sequence[int], masks: Mask) -> None:
        """Write the masks of the places after each token of a draft."""


class TokenFilter:
    """Allows some tokens only, and forbids the last token of a word where its others precede it.

    Args:
        allowed: the only tokens; none: all.
        words: token sequences that must not come.
        grammar: what else constrains the answer.
    """

    def __init__(
        self, allowed: Collection[int], words: Sequence[Sequence[int]], grammar: Matcher | None = None
    ) -> None:
        self._allowed = np.array(sorted(allowed), np.int64)
        self._words = [tuple(word) for word in words]
        self._longest = max(map(len, self._words), default=1)
        self._tail: list[int] = []
        self._grammar = grammar
        self._error = ""

    @property
    def error(self) -> str:
        """What has gone wrong for good; empty if nothing has."""
        return self._error or ("" if self._grammar is None else self._grammar.error)

    def consume(self, token_ids: Sequence[int]) -> None:
        """Go on over tokens of the answer."""
        self._tail = self._after(token_ids)
        if self._grammar is not None:
            self._grammar.consume(token_ids)

    def fill(self, mask: Mask) -> None:
        """Write which tokens may come next."""
        if self._grammar is None:
            mask.fill(-1)
        else:
            self._grammar.fill(mask)
        self._restrict(mask, self._tail)
        if not mask.any():
            self._error = NoTokenAllowed.CAUSE
            mask.fill(-1)

    def fill_ahead(self, draft: Sequence[int], masks: Mask) -> None:
        """Write the masks of the places after each token of a draft.

        Args:
            masks: one more than the draft has tokens; the first is for the place before it.
        """
        if self._grammar is None:
            masks.fill(-1)
        else:
            self._grammar.fill_ahead(draft, masks)
        for count, mask in enumerate(masks):
            self._restrict(mask, self._after(draft[:count]))

    def _after(self, token_ids: Sequence[int]) -> list[int]:
        return [*self._tail, *token_ids][-self._longest :]

    def _restrict(self, mask: Mask, tail: Sequence[int]) -> None:
        if len(self._allowed):
            only = np.zeros_like(mask)
            _set_bits(only, self._allowed)
            mask &= only
        ended = [word[-1] for word in self._words if tuple(tail[len(tail) - len(word) + 1 :]) == word[:-1]]
        if ended:
            banned = np.zeros_like(mask)
            _set_bits(banned, np.array(ended, np.int64))
            mask &= ~banned


def _set_bits(mask: Mask, token_ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    bits = np.uint32(1) << (token_ids % 32).astype(np.uint32)
    np.bitwise_or.at(mask.view(np.uint32), token_ids // 32, bits)
