"""Chats of several turns that share their beginnings, as a seed says: what the simulation is asked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

SYSTEM_PROMPTS = 16
"""Different first turns, of which the first ones are used most (Zipf's law)."""
SYSTEM_TOKENS = 192
TURNS = 4.0
"""Mean turns of a chat, geometrically distributed."""
MESSAGE_TOKENS = (24.0, 0.8)
"""Median tokens of a user's message, and the standard deviation of their logarithm."""
ANSWER_TOKENS = (24.0, 0.6)
"""The same for an answer."""
THINK_SECONDS = 5.0
"""Mean seconds between an answer and the next message, exponentially distributed."""
WORDS = (3, 60)
"""Token ids of the scripted model that stand for words."""


@dataclass(frozen=True)
class Turn:
    """One message of a user.

    Args:
        pause: seconds after the answer before it.
        message: its tokens.
        max_tokens: length of the answer.
    """

    pause: float
    message: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Chat:
    """One chat.

    Args:
        start: seconds after the start of the simulation.
        system: the tokens that it begins with.
    """

    start: float
    system: list[int]
    turns: list[Turn]


def make_chats(seed: int, requests: int, rate: float) -> Iterator[Chat]:
    """Yield chats in the order of their start, with ``requests`` turns in all.

    Args:
        rate: mean requests per second, in a Poisson process of chats.
    """
    source = random.Random(seed)
    systems = [_words(source, SYSTEM_TOKENS) for _ in range(SYSTEM_PROMPTS)]
    weights = [1 / (rank + 1) for rank in range(SYSTEM_PROMPTS)]
    now, left = 0.0, requests
    while left > 0:
        now += source.expovariate(rate / TURNS)
        count = 1
        while source.random() > 1 / TURNS:
            count += 1
        turns = [_turn(source) for _ in range(min(count, left))]
        left -= len(turns)
        yield Chat(now, source.choices(systems, weights)[0], turns)


def _turn(source: random.Random) -> Turn:
    message = _words(source, _length(source, MESSAGE_TOKENS))
    return Turn(source.expovariate(1 / THINK_SECONDS), message, _length(source, ANSWER_TOKENS))


def _length(source: random.Random, shape: tuple[float, float]) -> int:
    median, sigma = shape
    return max(1, min(400, round(median * source.lognormvariate(0.0, sigma))))


def _words(source: random.Random, count: int) -> list[int]:
    return source.choices(range(*WORDS), k=count)
