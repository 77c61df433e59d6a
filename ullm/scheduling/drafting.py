"""Drafts for speculative decoding: what followed when a sequence's last tokens stood in it before.

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

LONGEST_NGRAM, SHORTEST_NGRAM = 4, 2
"""How many last tokens are looked for: as many as can be found, fewer are chance."""
WINDOW = 8192
"""Tokens that are searched, the latest."""
STEP_IN_ROWS = 12
"""A step's fixed time, above all reading the weights, in times of one more row. On a CPU 6.9 ms against
0.55 ms; see docs/performance.md."""
WAIT_IN_ROWS = 2
"""The same for a step that is not planned while the one before runs: a draft needs its tokens. About 1 ms."""
FIRST_RATE = 0.5
"""Chance of a right guess that a sequence begins with."""
WEIGHT = 0.25
"""Of the latest token in that chance."""
MOST_RATE = 0.99

_SIZE = array("i").itemsize


def can_draft(params: SamplingParams) -> bool:
    """Whether the sampler can draw several tokens of such a request at once.

    Penalties depend on the tokens in between, and log probabilities are collected one per step. Biases,
    and bans before ``min_tokens``, depend on a token's index only.
    """
    penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    return not penalised and params.logprobs is None and params.prompt_logprobs is None


class Drafter:
    """Guesses how one sequence goes on, and counts how often that is right, used or not.

    Args:
        token_ids: the sequence so far.
    """

    __slots__ = ("_following", "_rate", "_text")

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._text = bytearray(array("i", token_ids).tobytes())  # searched far faster than a list
        self._following = find_following(self._text)
        self._rate = FIRST_RATE

    def observe(self, token_ids: Sequence[int]) -> None:
        """Compare what has come with what was guessed.

        Args:
            token_ids: the whole sequence, which has only grown.
        """
        for position in range(len(self._text) // _SIZE, len(token_ids)):
            self._observe(token_ids, position)

    def _observe(self, token_ids: Sequence[int], position: int) -> None:
        guess, token = self._following, token_ids[position]
        right = guess is not None and token_ids[guess] == token
        self._rate = min(MOST_RATE, self._rate + WEIGHT * (right - self._rate))
        self._text += array("i", (token,)).tobytes()
        self._following = guess + 1 if guess is not None and right else find_following(self._text)

    def value(self, rows: int) -> float:
        """What a step gains by one guess, in times of a row; 0 if it loses.

        Args:
            rows: sequences in the step.
        """
        return max(0.0, self._rate / price(rows) - 1)

    def propose(self, token_ids: Sequence[int], most: int, rows: int) -> list[int]:
        """The tokens that may follow; none if nothing is found, or it would not pay.

        Args:
            token_ids: the whole sequence, as observed.
            most: tokens to propose.
            rows: sequences in the step.
        """
        if self._following is None or most < 1 or not self.value(rows):
            return []
        # The n-th is right with the chance rate ** n, which must be its price.
        worthwhile = int(log(price(rows)) / log(self._rate))
        return continue_from(token_ids, self._following, min(most, max(1, worthwhile)))


def price(rows: int) -> float:
    """The chance at which a guess neither gains nor loses time: a row's share of a step.

    With a fixed time of B rows, a step of R rows takes B + R; with one guess for each it takes B + 2 R
    and gives 1 + p tokens for one. Equal at p = R / (B + R).
    """
    return rows / (rows + STEP_IN_ROWS)


def find_following(text: bytearray) -> int | None:
    """Index of the token after the latest earlier occurrence of the longest n-gram at the end.

    Args:
        text: tokens as C ints.
    """
    low = max(0, len(text) - WINDOW * _SIZE)
    end = len(text) - _SIZE  # at least one token must follow
    found = None
    for length in range(SHORTEST_NGRAM, LONGEST_NGRAM + 1):
        size = length * _SIZE
        # A longer one can only end where a shorter one does, so there is less and less to search.
        where = _find_last(text, text[-size:], low, end) if end >= size else -1
        if where < 0:
            break
        end = where + size
        found = end // _SIZE
    return found


def _find_last(text: bytearray, wanted: bytearray, low: int, end: int) -> int:
    where = text.rfind(wanted, low, end)
    while where > 0 and where % _SIZE:  # it begins within a token
        where = text.rfind(wanted, low, where + len(wanted) - 1)
    return where


def continue_from(token_ids: Sequence[int], start: int, count: int) -> list[int]:
    """``count`` tokens from ``start`` on; at the end of what is known, the same again, as in a loop."""
    known = list(token_ids[start : start + count])
    return [known[i % len(known)] for i in range(count)]
