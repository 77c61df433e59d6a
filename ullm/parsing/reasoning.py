"""``<think>…</think>``: what a model thinks before it answers, told from the answer."""

from __future__ import annotations

from collections.abc import Iterator

from ullm.parsing.parts import Parser, Part, Reasoning, Text, held_back

OPEN, CLOSE = "<think>", "</think>"


class ReasoningParser:
    """Splits reasoning off, and hands the rest to another parser.

    Args:
        rest: reads the answer; None: it is text.
        begun: whether the prompt has opened the tag already.
    """

    def __init__(self, rest: Parser | None, *, begun: bool) -> None:
        self._rest = rest
        self._state = "reasoning" if begun else "start"
        self._held = ""
        self._fresh = True

    def push(self, text: str) -> list[Part]:
        """See `ullm.parsing.parts.Parser`."""
        self._held += text
        return list(self._read())

    def finish(self) -> list[Part]:
        """See `ullm.parsing.parts.Parser`."""
        rest, self._held = self._held, ""
        if self._state == "reasoning":
            return [Reasoning(rest)] if rest else []
        parts = list(self._answer(rest)) if rest else []
        return [*parts, *(self._rest.finish() if self._rest is not None else ())]

    def _read(self) -> Iterator[Part]:
        if self._state == "start":
            text = self._held.lstrip()
            if not text or (OPEN.startswith(text) and text != OPEN):
                return
            self._state = "reasoning" if text.startswith(OPEN) else "answer"
            if self._state == "reasoning":
                self._held = text[len(OPEN) :]
        if self._state == "reasoning":
            yield from self._in_reasoning()
        if self._state == "answer" and self._held:
            text, self._held = self._held, ""
            yield from self._answer(text)

    def _in_reasoning(self) -> Iterator[Part]:
        if self._fresh:  # the tag is followed by a line end
            self._held = self._held.lstrip("\n")
            self._fresh = not self._held
        place = self._held.find(CLOSE)
        if place < 0:
            kept = self._held[: len(self._held) - held_back(self._held, CLOSE)].rstrip("\n")
        else:
            kept = self._held[:place].rstrip("\n")
        if kept:
            yield Reasoning(kept)
        self._held = self._held[len(kept) :]
        if place >= 0:
            self._held = self._held[self._held.find(CLOSE) + len(CLOSE) :]
            self._state, self._fresh = "answer", True

    def _answer(self, text: str) -> Iterator[Part]:
        if self._fresh and self._state == "answer":  # blank lines between reasoning and answer
            text = text.lstrip("\n")
            self._fresh = not text
        if text:
            yield from self._rest.push(text) if self._rest is not None else [Text(text)]
