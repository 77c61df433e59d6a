"""Calls that are written as JSON: an object with a name and arguments, or several of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ullm.parsing.parts import CallArguments, CallBegin, Part, Text

ARGUMENTS = ("arguments", "parameters")
"""Names that models give the arguments."""
_NAMES = ("name", "function")
_KNOWN = frozenset({*_NAMES, *ARGUMENTS, "type", "id"})
"""Keys, one of which is the first of a call."""


class ObjectScanner:
    """Follows one JSON object as it comes, and notes where the values of its own keys are.

    Attributes:
        text: the object so far.
        done: whether it is complete.
        broken: whether it cannot be JSON.
    """

    def __init__(self) -> None:
        self.text = ""
        self.done = self.broken = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._string_start = 0
        self._last_string: str | None = None
        self._key: str | None = None
        self._spans: dict[str, list[int]] = {}

    def push(self, text: str) -> int:
        """Take characters up to the end of the object; return how many."""
        for count, character in enumerate(text):
            if self.done or self.broken:
                return count
            self.text += character
            self._step(character, len(self.text) - 1)
        return len(text)

    def values(self, *keys: str) -> Iterator[tuple[str, bool]]:
        """Iterate over the values of these keys, in their order in the text, and whether they are complete.

        Of a key that is there twice the first one counts: it may have been given out before the second came.
        """
        for key, (start, *end) in self._spans.items():
            if key in keys:
                yield self.text[start : end[0] if end else None].strip(), bool(end)

    @property
    def keys(self) -> Sequence[str]:
        """The keys so far."""
        return list(self._spans)

    def _step(self, character: str, place: int) -> None:
        if self._in_string:
            self._step_in_string(character, place)
        elif character == '"':
            self._in_string, self._string_start = True, place
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._end_value(place)
            self._depth -= 1
            self.done = self._depth == 0
        elif self._depth == 1 and character == ":" and self._last_string is not None:
            self._key, self._last_string = self._last_string, None
            self._spans.setdefault(self._key, [place + 1])
        elif self._depth == 1 and character == ",":
            self._end_value(place)

    def _step_in_string(self, character: str, place: int) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if self._depth == 1 and self._key is None:
                try:
                    self._last_string = json.loads(self.text[self._string_start : place + 1], strict=False)
                except ValueError:
                    self.broken = True

    def _end_value(self, place: int) -> None:
        if self._depth == 1 and self._key is not None:
            span = self._spans[self._key]
            if len(span) == 1:
                span.append(place)
            self._key = None


class JsonCall:
    """One call of a tool, written as an object.

    Args:
        index: of the call within the answer.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self._scanner = ObjectScanner()
        self._begun = False
        self._sent = 0

    @property
    def text(self) -> str:
        """What was written of it."""
        return self._scanner.text

    @property
    def begun(self) -> bool:
        """Whether its beginning was given out, so that it can no longer be text."""
        return self._begun

    @property
    def over(self) -> bool:
        """Whether no further character belongs to it."""
        return self._scanner.done or self._scanner.broken

    @property
    def hopeless(self) -> bool:
        """Whether it is no call."""
        return not self._begun and (self._scanner.broken or self._scanner.done or self._strange)

    def push(self, text: str) -> tuple[int, list[Part]]:
        """Return how many characters belong to it, and the parts that they complete."""
        used = self._scanner.push(text)
        parts: list[Part] = []
        if not self._begun and not self._strange and (name := self._name()):
            self._begun = True
            parts.append(CallBegin(self.index, name))
        if self._begun:
            arguments = self._arguments()
            if len(arguments) > self._sent:
                parts.append(CallArguments(self.index, arguments[self._sent :]))
                self._sent = len(arguments)
        return used, parts

    @property
    def _strange(self) -> bool:
        return bool(self._scanner.keys) and self._scanner.keys[0] not in _KNOWN

    def _name(self) -> str:
        for text, complete in self._scanner.values(*_NAMES):
            if complete and (name := _unquoted(text)):
                return name
        return ""

    def _arguments(self) -> str:
        """Return the arguments as far as they can be given out."""
        text, complete = next(self._scanner.values(*ARGUMENTS), ("", self._scanner.done))
        if complete and text in ("", "null"):
            return "{}"
        if text.startswith('"'):  # JSON within a text
            return (_unquoted(text) or text) if complete else ""
        return "" if "null".startswith(text) else text


class JsonCallsParser:
    """An answer that is calls, if it begins like them: objects, one after the other or in a list.

    Args:
        prefixes: markers that may come before.
        first_index: number of calls before.
    """

    def __init__(self, prefixes: Sequence[str] = (), first_index: int = 0) -> None:
        self._prefixes = tuple(prefixes)
        self._held = ""
        self._call: JsonCall | None = None
        self._calls = first_index
        self._first = first_index
        self._is_text = False
        self._is_over = False

    @property
    def count(self) -> int:
        """Number of calls, those before included."""
        return self._calls

    def push(self, text: str) -> list[Part]:
        """See `Parser.push`."""
        if self._is_over:
            return []
        self._held += text
        return list(self._read())

    def finish(self) -> list[Part]:
        """See `Parser.finish`."""
        parts: list[Part] = []
        if self._call is not None:
            if self._call.begun:
                self._calls += 1
            else:
                self._held = self._call.text + self._held
                self._is_text = self._calls == self._first
            self._call = None
        rest, self._held = self._held, ""
        if rest and (self._is_text or self._calls == self._first):
            parts.append(Text(rest))
        return parts

    def _read(self) -> Iterator[Part]:
        while self._held:
            if self._is_text:
                yield Text(self._held)
                self._held = ""
            elif self._call is not None:
                yield from self._read_call(self._call)
                if self._call is not None and not self._call.over:
                    return
            elif not self._begin_call():
                return

    def _begin_call(self) -> bool:
        """Skip what may stand before a call; return False to wait for more."""
        rest = self._held.lstrip(" \n\r\t;,[]" if self._calls > self._first else " \n\r\t[")
        if not rest:
            return False
        for prefix in self._prefixes:
            if rest.startswith(prefix):
                self._held = rest[len(prefix) :]
                return True
            if prefix.startswith(rest):
                return False
        if rest[0] == "{":
            self._held, self._call = rest, JsonCall(self._calls)
        else:
            self._end_calls()
        return True

    def _end_calls(self) -> None:
        """Something else than a call comes: after calls it is not shown, nor are further calls looked for."""
        if self._calls > self._first:
            self._is_over, self._held = True, ""
        else:
            self._is_text = True

    def _read_call(self, call: JsonCall) -> Iterator[Part]:
        used, parts = call.push(self._held)
        self._held = self._held[used:]
        yield from parts
        if call.hopeless:
            self._held, self._call = call.text + self._held, None
            self._end_calls()
        elif call.over:
            self._calls += 1
            self._call = None


def _unquoted(text: str) -> str:
    """Return the text that a JSON string stands for; empty if it is none, or cannot be sent."""
    try:
        value = json.loads(text, strict=False)
        return value if isinstance(value, str) and value.encode() else ""
    except (ValueError, RecursionError):
        return ""


def dump(arguments: dict[str, Any]) -> str:
    """Return arguments as JSON text.

    Raises:
        ValueError: there is a value that JSON does not have, such as an infinite number.
    """
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(arguments, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    return text
