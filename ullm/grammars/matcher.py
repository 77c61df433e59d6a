"""Matchers: where an answer is in its grammar, and which tokens may come next.

A matcher's state is a function of the grammar and the answer's tokens, so a resumed request goes on inside
its grammar.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from ullm.grammars.compiler import LIMITS

CACHED_GRAMMARS = 64
"""Compiled grammars that are kept; each may take some megabytes of states."""

Mask = npt.NDArray[np.int32]
"""One bit per token, 32 to an integer, the lowest first: 1 where it may come next."""


class Vocabulary:
    """What llguidance must know of a tokenizer.

    Args:
        tokens: the bytes of each token.
        special_token_ids: tokens that never stand for text.
        eos_token_ids: tokens that end an answer whose grammar is complete.
        encode: a text's tokens, without special ones.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_token_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = sorted({*special_token_ids, *eos_token_ids})
        self.eos_token_ids = list(eos_token_ids)
        self.eos_token_id = self.eos_token_ids[0]
        self.bos_token_id = None
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class GrammarMatcher:
    """One answer's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def error(self) -> str:
        """What has gone wrong for good; empty if nothing has. Only grammars of great cost get there."""
        return " ".join(self._matcher.get_error().removesuffix("<non-verbose/>").split())

    def consume(self, token_ids: Sequence[int]) -> None:
        """Go on over tokens of the answer. Those after its end are ignored."""
        for token_id in token_ids:
            if self._matcher.is_stopped():
                return
            self._matcher.consume_token(token_id)

    def fill(self, mask: Mask) -> None:
        """Write which tokens may come next; all of them after an error."""
        if self._matcher.is_error():
            mask.fill(-1)
        else:
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            mask.fill(-1)

    def fill_ahead(self, draft: Sequence[int], masks: Mask) -> None:
        """Write the masks of the places after each token of a draft, as long as it is within the grammar.

        Args:
            masks: one more than the draft has tokens; the first is for the place before it.
        """
        ahead = GrammarMatcher(self._matcher.deep_copy())
        ahead.fill(masks[0])
        for token_id, mask in zip(draft, masks[1:], strict=True):
            if ahead._matcher.try_consume_tokens([token_id]) != 1:
                return
            ahead.fill(mask)


class MatcherFactory:
    """Makes matchers, and keeps the compiled grammars of the last ones.

    Args:
        vocabulary: of the model's tokenizer.
        vocab_size: number of the model's logits.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(vocabulary), n_vocab=vocab_size, eos_token=vocabulary.eos_token_ids
        )
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self.mask_words = -(-vocab_size // 32)

    def make(self, definition: str) -> GrammarMatcher:
        """Return a matcher at the begin of a grammar, which has been checked."""
        compiled = self._compiled.get(definition)
        if compiled is None:
            compiled = LLMatcher(self._tokenizer, definition, log_level=0, limits=LIMITS)
            self._compiled[definition] = compiled
            if len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(definition)
        return GrammarMatcher(compiled.deep_copy())
