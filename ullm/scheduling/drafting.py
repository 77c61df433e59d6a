"""Drafts for speculative decoding: the tokens that followed an earlier occurrence of the last ones.

A draft costs no model: code, quotations and answers about a text repeat it (Saxena, Prompt Lookup
Decoding, 2023; Leviathan et al., arXiv:2211.17192, for the verification of drafts). A drafted token is
accepted exactly if the token that would have been sampled in its place equals it, so drafts change how
many steps a text takes, never the text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from math import log

from ullm.sampling import SamplingParams

MAX_NGRAM, MIN_NGRAM = 4, 2
"""Length of the n-gram that is looked up; the longest that occurs is used, shorter ones match by chance."""
WINDOW = 8192
"""How many of the latest tokens are searched."""
STEP_COST = 12
"""Fixed time of a step, mostly for reading the weights, in units of the time that one more sequence adds.
On a CPU 6.9 ms against 0.55 ms; see docs/explanation/performance.md."""
WAIT_COST = 2
"""Cost of not planning a step while the one before runs, in the same units: a draft needs the latest token.
About 1 ms."""
INITIAL_RATE = 0.5
"""Acceptance rate that a sequence begins with."""
RATE_WEIGHT = 0.25
"""Weight of the latest token in the moving average of the acceptance rate."""
MAX_RATE = 0.99

_SIZE = array("i").itemsize


def can_draft(params: SamplingParams) -> bool:
    """Whether the sampler can sample several tokens of such a request in one step.

    Penalties depend on the tokens in between, and log probabilities are collected one per step. Biases,
    and bans before ``min_tokens``, depend on a token's index only.
    """
    penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    return not penalised and params.logprobs is None and params.prompt_logprobs is None


class Drafter:
    """Drafts the next tokens of one sequence, and estimates how often drafts are right, used or not.

    Args:
        token_ids: the sequence so far.
    """

    __slots__ = ("_following", "_rate", "_text")

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._text = bytearray(array("i", token_ids).tobytes())  # searched far faster than a list
        self._following = find_following(self._text)
        self._rate = INITIAL_RATE

    def observe(self, token_ids: Sequence[int]) -> None:
        """Compare new tokens with the draft, which updates the acceptance rate.

        Args:
            token_ids: the whole sequence, which has only grown since the last call.
        """
        for position in range(len(self._text) // _SIZE, len(token_ids)):
            self._observe(token_ids, position)

    def _observe(self, token_ids: Sequence[int], position: int) -> None:
        guess, token = self._following, token_ids[position]
        right = guess is not None and token_ids[guess] == token
        self._rate = min(MAX_RATE, self._rate + RATE_WEIGHT * (right - self._rate))
        self._text += array("i", (token,)).tobytes()
        self._following = guess + 1 if guess is not None and right else find_following(self._text)

    def value(self, batch_size: int) -> float:
        """Return the expected gain of one drafted token, in units of the cost of a sequence; 0 if it loses.

        Args:
            batch_size: sequences in the step.
        """
        return max(0.0, self._rate / price(batch_size) - 1)

    def propose(self, token_ids: Sequence[int], limit: int, batch_size: int) -> list[int]:
        """Draft the next tokens; none if there is no earlier occurrence, or a draft would not pay.

        Args:
            token_ids: the whole sequence, as observed.
            limit: maximum number of tokens to draft.
            batch_size: sequences in the step.
        """
        if self._following is None or limit < 1 or not self.value(batch_size):
            return []
        # The n-th is right with probability rate ** n, which must be at least its price.
        worthwhile = int(log(price(batch_size)) / log(self._rate))
        return continue_from(token_ids, self._following, min(limit, max(1, worthwhile)))


def price(batch_size: int) -> float:
    """Return the probability of being right at which a drafted token neither gains nor loses time.

    With a fixed time of B units, a step of R sequences takes B + R; with one drafted token for each it takes
    B + 2 R and yields 1 + p tokens instead of one. Both rates are equal at p = R / (B + R).
    """
    return batch_size / (batch_size + STEP_COST)


def find_following(text: bytearray) -> int | None:
    """Return the index of the token after the latest earlier occurrence of the longest n-gram at the end.

    Args:
        text: tokens as C ints.
    """
    low = max(0, len(text) - WINDOW * _SIZE)
    end = len(text) - _SIZE  # at least one token must follow
    following = None
    for length in range(MIN_NGRAM, MAX_NGRAM + 1):
        size = length * _SIZE
        # A longer n-gram can only end where a shorter one does, so the range to search shrinks.
        where = _find_last(text, text[-size:], low, end) if end >= size else -1
        if where < 0:
            break
        end = where + size
        following = end // _SIZE
    return following


def _find_last(text: bytearray, ngram: bytearray, low: int, end: int) -> int:
    where = text.rfind(ngram, low, end)
    while where > 0 and where % _SIZE:  # it begins within a token
        where = text.rfind(ngram, low, where + len(ngram) - 1)
    return where


def continue_from(token_ids: Sequence[int], start: int, count: int) -> list[int]:
    """Return ``count`` tokens from ``start`` on, repeated from ``start`` where the sequence ends."""
    known = list(token_ids[start : start + count])
    return [known[i % len(known)] for i in range(count)]
