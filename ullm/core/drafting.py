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
FIRST_RATE = 0.75
"""Chance of acceptance that a sequence begins with; high, because a refused draft is soon learned from."""
WEIGHT = 0.25
"""Of the latest token in that chance."""
LEAST_RATE, MOST_RATE = 0.01, 0.99
PAUSE = 32
"""Tokens without a draft once drafts have not been worth their price; then one token is tried."""

_SIZE = array("i").itemsize


def can_draft(params: SamplingParams) -> bool:
    """Whether the sampler can draw several tokens of such a request at once.

    Penalties depend on the tokens in between, and log probabilities are collected one per step. Biases,
    and bans before ``min_tokens``, depend on a token's index only.
    """
    penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    return not penalised and params.logprobs is None and params.prompt_logprobs is None


class Drafter:
    """Drafts for one sequence, as long as they are worth it."""

    __slots__ = ("_pause_until", "_rate", "_text")

    def __init__(self) -> None:
        self._text = bytearray()  # searched by memory blocks, a hundred times as fast as a list
        self._rate = FIRST_RATE
        self._pause_until = 0

    def waits(self, num_tokens: int) -> bool:
        """Whether there will be no draft at this length of the sequence."""
        return num_tokens < self._pause_until

    def propose(self, token_ids: Sequence[int], most: int, rows: int) -> list[int]:
        """The tokens that may follow; none if nothing is found.

        Args:
            token_ids: the whole sequence, which has only grown since the last call.
            most: tokens to propose.
            rows: sequences in the step.
        """
        if most < 1 or self.waits(len(token_ids)):
            return []
        self._text += array("i", token_ids[len(self._text) // _SIZE :]).tobytes()
        following = find_following(self._text)
        if following is None:
            return []
        return continue_from(token_ids, following, min(most, self._worthwhile(rows)))

    def learn(self, drafted: int, accepted: int, num_tokens: int, rows: int) -> None:
        """A draft has been verified.

        Args:
            num_tokens: length of the sequence now.
            rows: sequences in a step.
        """
        for success in [1] * accepted + [0] * (accepted < drafted):
            self._rate += WEIGHT * (success - self._rate)
        self._rate = min(max(self._rate, LEAST_RATE), MOST_RATE)
        if self._rate < price(rows):
            self._pause_until = num_tokens + PAUSE

    def _worthwhile(self, rows: int) -> int:
        """Tokens to draft: the n-th is accepted with the chance ``rate ** n``, which must be its price."""
        return max(1, int(log(price(rows)) / log(self._rate)))


def price(rows: int) -> float:
    """The chance of acceptance at which drafting neither wins nor loses: a row's share of a step's time.

    With a fixed time of B rows, a step of R rows takes B + R; with one drafted token each, it takes
    B + 2 R and gives 1 + p tokens for one. Equal at p = R / (B + R).
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
