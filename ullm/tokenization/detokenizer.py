"""The detokenizer: from tokens to text, a delta at a time, up to a stop string however tokens split it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from ullm.tokenization.stop_strings import HeldText, StopString


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
        stop: strings that end the text; the earliest one in the text wins. Texts of the same stop strings
            share what is known about them if they are given as `StopString`.
        include_stop: whether the stop string is part of the text.
        min_tokens: stop strings that end within the first ``min_tokens`` tokens do not count.
        hidden: special tokens that are not shown, but are part of stop strings → how they are written.
    """

    def __init__(
        self,
        decoder: IncrementalDecoder,
        stop: Sequence[str | StopString] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        hidden: Mapping[int, str] = {},
    ) -> None:
        self._decoder = decoder
        self._stop = [StopString(each) if isinstance(each, str) else each for each in stop]
        self._matched = [0] * len(self._stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._hidden = hidden
        self._held = HeldText()

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Add tokens, and return their text; text after a stop string is dropped."""
        if not self._stop:
            return TextDelta(self._decoder.push(token_ids), len(token_ids))
        shown: list[str] = []
        for count, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            text, stop = self._search(self._decoder.push((token_id,)))
            shown.append(text)
            if stop is None and (written := self._hidden.get(token_id)) is not None:
                text, stop = self._search(written, shown=False)
                shown.append(text)
            if stop is not None:
                return TextDelta("".join(shown), count, stop)
        return TextDelta("".join(shown), len(token_ids))

    def flush(self) -> TextDelta:
        """Return the rest of the text, once there are no more tokens; it may contain a stop string."""
        text, stop = self._search(self._decoder.flush())
        if stop is None:
            text += self._held.take(self._held.length)
        return TextDelta(text, 0, stop)

    def _search(self, piece: str, *, shown: bool = True) -> tuple[str, str | None]:
        held, counts = self._held, self._num_tokens > self._min_tokens
        held.append(piece, shown=shown)
        hit: tuple[int, StopString] | None = None
        for order, stop in enumerate(self._stop):
            self._matched[order], end = stop.search(piece, self._matched[order], to_end=not counts)
            if end is not None:  # of several, the one that starts first; then the one listed first
                start = held.length - len(piece) + end - len(stop.text)
                if hit is None or start < hit[0]:
                    hit = start, stop
        if hit is None:
            return held.take(held.length - max(self._matched, default=0)), None
        start, stop = hit
        return held.take(start) + (stop.text if self._include_stop else ""), stop.text
