"""`ThinkingTokens`: the tokens between which a model thinks, for a budget of those in between."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThinkingTokens:
    """The tokens that begin and end what a model thinks.

    Args:
        begin: the token of ``<think>``; -1: there is none, so only the prompt can begin it.
        end: the token of ``</think>``.
        begun: whether the prompt has begun it.
    """

    begin: int
    end: int
    begun: bool
