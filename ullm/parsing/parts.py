"""The parts of an answer, and the interface of what finds them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of a tool begins; its arguments follow, in pieces.

    Args:
        index: 0 is the answer's first call.
    """

    index: int
    name: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments, which are JSON text."""

    index: int
    text: str


Part = Text | Reasoning | CallBegin | CallArguments


class Parser(Protocol):
    """Finds parts in a text that comes in pieces, however it is cut.

    A call that turns out not to be one is text. The parts of a whole text are the same, joined, whatever its
    pieces are.
    """

    def push(self, text: str) -> Sequence[Part]:
        """Return the parts that a further piece completes."""

    def finish(self) -> Sequence[Part]:
        """Return the rest; the text is over."""


def held_back(text: str, *markers: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a marker."""
    longest = min(len(text), max(map(len, markers)) - 1)
    for size in range(longest, 0, -1):
        if any(marker.startswith(text[-size:]) for marker in markers):
            return size
    return 0
