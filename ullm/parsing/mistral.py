"""``[TOOL_CALLS]``, followed by a list of objects, or by ``name[ARGS]{…}`` or ``name{…}``, repeated."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ullm.parsing.json_calls import JsonCallsParser, ObjectScanner
from ullm.parsing.parts import CallArguments, CallBegin, Part, Text, held_back

MARKER = "[TOOL_CALLS]"
# Quantifiers never give back what they took: a model may write anything, of any length.
_NAMED = re.compile(r"\s*+([\w.-]++)\s*+(?:\[CALL_ID\]\s*+[\w-]++\s*+)?+(?:\[ARGS\]\s*+)?+(?=\{)")
_MAYBE_NAMED = re.compile(r"\s*+[\w.-]*+\s*+(?:\[[A-Z_]*+\]?+\s*+[\w-]*+\s*+)*+")


class MistralParser:
    """Finds calls after markers."""

    def __init__(self) -> None:
        self._held = ""
        self._calls = 0
        self._list: JsonCallsParser | None = None
        self._list_shown = False
        self._arguments: ObjectScanner | None = None
        self._in_calls = False

    def push(self, text: str) -> list[Part]:
        """See `ullm.parsing.parts.Parser`."""
        self._held += text
        parts: list[Part] = []
        while True:
            before = self._held
            parts += self._step()
            if self._held == before:
                return parts

    def finish(self) -> list[Part]:
        """See `ullm.parsing.parts.Parser`."""
        parts: list[Part] = []
        if self._list is not None:
            parts += self._from_list([*self._list.push(self._held), *self._list.finish()])
        elif self._held and not (self._in_calls and self._calls):
            parts.append(Text((MARKER if self._in_calls else "") + self._held))
        self._held = ""
        return parts

    def _step(self) -> Iterator[Part]:
        if self._list is not None:
            yield from self._from_list(self._list.push(self._held))
            self._held = ""
        elif self._arguments is not None:
            yield from self._in_arguments(self._arguments)
        elif self._in_calls:
            yield from self._at_call()
        else:
            yield from self._in_text()

    def _from_list(self, parts: list[Part]) -> Iterator[Part]:
        for part in parts:
            if isinstance(part, Text) and not self._list_shown:  # no call
                yield Text(MARKER)
            self._list_shown = True
            yield part

    def _in_text(self) -> Iterator[Part]:
        place = self._held.find(MARKER)
        end = len(self._held) - held_back(self._held, MARKER) if place < 0 else place
        shown, self._held = self._held[:end], self._held[end:]
        if shown:
            yield Text(shown)
        if place >= 0:
            self._held, self._in_calls = self._held[len(MARKER) :], True

    def _at_call(self) -> Iterator[Part]:
        text = self._held.lstrip()
        if self._calls and text.startswith(MARKER):
            self._held = text[len(MARKER) :]
        elif text and text[0] in "[{" and not self._calls:
            self._list = JsonCallsParser()
        elif named := _NAMED.match(self._held):
            yield CallBegin(self._calls, named[1])
            self._held, self._arguments = self._held[named.end() :], ObjectScanner()
        elif text and not _MAYBE_NAMED.fullmatch(self._held) and not self._calls:
            yield Text(MARKER)  # no call
            self._in_calls = False
            yield from self._in_text()

    def _in_arguments(self, scanner: ObjectScanner) -> Iterator[Part]:
        used = scanner.push(self._held)
        taken, self._held = self._held[:used], self._held[used:]
        if taken:
            yield CallArguments(self._calls, taken)
        if scanner.done or scanner.broken:
            self._calls += 1
            self._arguments = None
