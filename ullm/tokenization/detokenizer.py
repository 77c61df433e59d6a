"""The detokenizer: from tokens to text, a delta at a time, up to a stop string however tokens split it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class IncrementalDecoder(Protocol):
    """Decodes a growing sequence; holds back bytes that do not yet make a character."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete; may be empty."""

    def flush(self) -> str:
        """Return what is still held back, undecodable bytes as U+FFFD; the sequence is over."""


class TextDelta(msgspec.Struct, frozen=True):
    """The text that some tokens added.

    Args:
        text: safe to show: no part of it can turn out to belong to a stop string.
        num_tokens: tokens used; fewer than pushed if a stop string ended the text among them.
        stop: the stop string that ended the text.
    """

    text: str
    num_tokens: int
    stop: str | None = None


class TextAssembler:
    """The text of one sequence.

    Args:
        decoder: decodes its tokens.
        stop: strings that end the text; the earliest one in the text wins.
        include_stop: whether the stop string is part of the text.
        min_tokens: stop strings that end within the first ``min_tokens`` tokens do not count.
    """

    def __init__(
        self,
        decoder: IncrementalDecoder,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Add tokens, and return their text; text after a stop string is dropped."""
        if not self._stop:
            return TextDelta(self._decoder.push(token_ids), len(token_ids))
        shown: list[str] = []
        for count, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            text, stop = self._search(self._decoder.push((token_id,)))
            shown.append(text)
            if stop is not None:
                return TextDelta("".join(shown), count, stop)
        return TextDelta("".join(shown), len(token_ids))

    def flush(self) -> TextDelta:
        """Return the rest of the text, once there are no more tokens; it may contain a stop string."""
        text, stop = self._search(self._decoder.flush())
        if stop is None:
            text, self._held = text + self._held, ""
        return TextDelta(text, 0, stop)

    def _search(self, piece: str) -> tuple[str, str | None]:
        text = self._held + piece
        hit = None if self._num_tokens <= self._min_tokens else _earliest(text, self._stop)
        if hit is not None:
            position, stop = hit
            self._held = ""
            return text[: position + (len(stop) if self._include_stop else 0)], stop
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None


def _earliest(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Return the stop string that starts first; of several that start there, the one listed first."""
    hits = [(position, stop) for stop in stops if (position := text.find(stop)) >= 0]
    return min(hits, key=lambda hit: hit[0], default=None)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
