"""``<tool_call>{"name": …, "arguments": {…}}</tool_call>``: Hermes, Qwen, SmolLM2 (a list within), others.

And Qwen3-Coder: ``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ullm.parsing.json_calls import JsonCallsParser, dump
from ullm.parsing.parts import CallArguments, CallBegin, Part, Text, held_back

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


class HermesParser:
    """Finds calls between tags.

    Args:
        schemas: tool → JSON schema of its arguments, by which values of XML are converted.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        self._held = ""
        self._calls = 0
        self._inside: JsonCallsParser | None = None
        self._region = ""
        self._read = 0
        self._blank = ""

    def push(self, text: str) -> list[Part]:
        """See `ullm.parsing.parts.Parser`."""
        self._held += text
        parts: list[Part] = []
        while True:
            before = self._held
            parts += self._in_call(self._inside) if self._inside is not None else self._in_text()
            if self._held == before:
                return parts

    def finish(self) -> list[Part]:
        """See `ullm.parsing.parts.Parser`."""
        parts: list[Part] = []
        if self._inside is not None:
            parts += self._take(self._inside, self._held)
            parts += self._leave(self._inside, closed=False)
        elif self._held:
            parts += self._shown(self._held)
        if self._blank and not self._calls:
            parts.append(Text(self._blank))
        self._held = self._blank = ""
        return parts

    def _in_text(self) -> Iterator[Part]:
        place = self._held.find(OPEN)
        if place < 0:
            end = len(self._held) - held_back(self._held, OPEN)
            shown, self._held = self._held[:end], self._held[end:]
            yield from self._shown(shown)
            return
        shown, self._held = self._held[:place], self._held[place + len(OPEN) :]
        yield from self._shown(shown)
        self._inside, self._region, self._read = JsonCallsParser(first_index=self._calls), "", 0

    def _shown(self, text: str) -> Iterator[Part]:
        """Yield text; blanks are held back, since they belong to calls if one follows."""
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        if kept and not (self._calls and not kept.strip()):
            yield Text(kept)

    def _in_call(self, inside: JsonCallsParser) -> Iterator[Part]:
        place = self._held.find(CLOSE)
        end = len(self._held) - held_back(self._held, CLOSE) if place < 0 else place
        taken, self._held = self._held[:end], self._held[end:]
        yield from self._take(inside, taken)
        if place >= 0:
            self._held = self._held[len(CLOSE) :]
            yield from self._leave(inside, closed=True)

    def _take(self, inside: JsonCallsParser, text: str) -> Iterator[Part]:
        self._region += text
        if not self._is_xml():  # maybe it was, by its first characters
            text, self._read = self._region[self._read :], len(self._region)
            yield from (part for part in inside.push(text) if not isinstance(part, Text))

    def _leave(self, inside: JsonCallsParser, *, closed: bool) -> Iterator[Part]:
        """Yield what is left of a region; if it has no call, it is text, its tags included."""
        if self._is_xml():
            yield from self._xml_calls(closed=closed)
        else:
            yield from (part for part in inside.finish() if not isinstance(part, Text))
            if inside.count == self._calls and self._region.strip() != "[]":
                yield from self._shown(OPEN + self._region + (CLOSE if closed else ""))
            self._calls = inside.count
            if self._calls:
                self._blank = ""
        self._inside, self._region = None, ""

    def _is_xml(self) -> bool:
        start = self._region.lstrip()[: len("<function=")]
        return bool(start) and "<function=".startswith(start)

    def _xml_calls(self, *, closed: bool) -> Iterator[Part]:
        found = list(_FUNCTION.finditer(self._region))
        if not found:
            yield from self._shown(OPEN + self._region + (CLOSE if closed else ""))
        for function in found:
            properties = self._schemas.get(function[1], {}).get("properties")
            types = properties if isinstance(properties, Mapping) else {}
            arguments = {
                name: _converted(value, types.get(name)) for name, value in _PARAMETER.findall(function[2])
            }
            yield CallBegin(self._calls, function[1])
            yield CallArguments(self._calls, dump(arguments))
            self._calls += 1
            self._blank = ""


def _converted(value: str, schema: Any) -> Any:
    """Return a value of XML by its schema: text as it is, everything else as JSON, if it is JSON."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return value
    try:
        parsed = json.loads(value)
        dump({"": parsed})
    except (ValueError, RecursionError):
        return value
    return parsed
