"""A matcher that ends what a model thinks once it has had its tokens for that."""

from __future__ import annotations

from collections.abc import Sequence

from ullm.grammars.matcher import Mask
from ullm.grammars.thinking import ThinkingTokens
from ullm.grammars.token_filter import Matcher


class ThinkingBudget:
    """Allows only the end of thinking after a number of tokens of it.

    Its state is a function of the answer's tokens, so a resumed request has the same tokens left.

    Args:
        budget: the number of tokens between the beginning and the end.
        rest: what else constrains the answer. Where it forbids the end, it is right.
    """

    def __init__(self, thinking: ThinkingTokens, budget: int, rest: Matcher | None = None) -> None:
        self._thinking = thinking
        self._rest = rest
        self._budget = budget
        self._left: int | None = budget if thinking.begun else None
        self._over = False

    @property
    def error(self) -> str:
        """What has gone wrong for good; empty if nothing has."""
        return "" if self._rest is None else self._rest.error

    def consume(self, token_ids: Sequence[int]) -> None:
        """Go on over tokens of the answer."""
        self._left, self._over = self._after(token_ids)
        if self._rest is not None:
            self._rest.consume(token_ids)

    def fill(self, mask: Mask) -> None:
        """Write which tokens may come next."""
        if self._rest is None:
            mask.fill(-1)
        else:
            self._rest.fill(mask)
        self._restrict(mask, self._left)

    def fill_ahead(self, draft: Sequence[int], masks: Mask) -> None:
        """Write the masks of the places after each token of a draft.

        Args:
            masks: one more than the draft has tokens; the first is for the place before it.
        """
        if self._rest is None:
            masks.fill(-1)
        else:
            self._rest.fill_ahead(draft, masks)
        for count, mask in enumerate(masks):
            self._restrict(mask, self._after(draft[:count])[0])

    def _after(self, token_ids: Sequence[int]) -> tuple[int | None, bool]:
        """Return the tokens left, if the model thinks after these tokens, and whether it has thought."""
        left, over = self._left, self._over
        for token in token_ids:
            if over:
                break
            if left is None:
                left = self._budget if token == self._thinking.begin else None
            elif token == self._thinking.end:
                left, over = None, True
            else:
                left = max(0, left - 1)
        return left, over

    def _restrict(self, mask: Mask, left: int | None) -> None:
        if left != 0:
            return
        word, bit = divmod(self._thinking.end, 32)
        kept = mask.view("uint32")[word] & (1 << bit)
        if kept:
            mask.fill(0)
            mask.view("uint32")[word] = kept
