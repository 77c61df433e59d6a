"""Special tokens that messages spell out, kept apart from those that the chat template writes.

Each is replaced by a mark before the template is rendered. The rendered text is then cut at the marks, and
what they stand for is encoded as text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_ROLES = ("user", "tool", "function")


class SpelledTokens:
    """What one conversation spells out.

    Args:
        tokens: the special tokens as texts.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._name = secrets.token_hex(8)  # no message can have it
        self._found: list[str] = []

    def hide(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the messages with marks in those of users and tools."""
        return [self._hidden(each) if each.get("role") in _ROLES else each for each in messages]

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield the pieces of a rendered text, and whether each is one that a message spells out."""
        for number, piece in enumerate(re.split(rf"\ue000{self._name}:(\d+)\ue001", text)):
            if piece:
                yield (self._found[int(piece)], True) if number % 2 else (piece, False)

    def _hidden(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": self._marked(content)}
        if isinstance(content, list):
            return {**message, "content": [self._hidden_part(part) for part in content]}
        return message

    def _hidden_part(self, part: Any) -> Any:
        if isinstance(part, str):
            return self._marked(part)
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            return {**part, "text": self._marked(part["text"])}
        return part

    def _marked(self, text: str) -> str:
        return self._tokens.sub(self._mark, text)

    def _mark(self, match: re.Match[str]) -> str:
        self._found.append(match[0])
        return f"\ue000{self._name}:{len(self._found) - 1}\ue001"
