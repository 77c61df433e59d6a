"""From token ids to text: the bytes of each token, and decoders for a growing sequence.

A token is a piece of bytes, not of text: a character may begin in one token and end in another. So an
`IncrementalDecoder` holds bytes back until they make a character.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

REPLACEMENT = "\ufffd"
"""Stands for bytes that are not UTF-8."""

CONTEXT_TOKENS = 8
"""Tokens of the prompt that decoding starts with; enough for a whole character before the first token."""

HELD_TOKENS = 16
"""Tokens without a complete character after which the text is returned as it is. A character has at most
four bytes, so these will never make one."""


def byte_alphabet() -> dict[str, int]:
    """Return the characters that byte-level BPE uses for bytes.

    Printable bytes stand for themselves, the others are moved to U+0100 and above; from GPT-2's
    ``bytes_to_unicode``.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenBytes(dict[int, bytes]):
    """Token id → bytes, looked up once per token; empty for an id that is not in the vocabulary.

    Models may have more ids than tokens.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        kinds = set(_decoder_kinds(json.loads(backend.to_str())["decoder"]))
        self._backend = backend
        self._alphabet = byte_alphabet()
        self.byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""  # not cached: there may be any number of them
        value = self[token_id] = self._bytes_of(token)
        return value

    def _bytes_of(self, token: str) -> bytes:
        if self.byte_level:
            try:
                return bytes(self._alphabet[character] for character in token)
            except KeyError:  # an added token with a blank or another character stands for itself
                return token.encode()
        if self._byte_fallback and (match := re.fullmatch(r"<0x([0-9A-F]{2})>", token)):
            return bytes.fromhex(match[1])
        return token.replace("\u2581", " ").encode()


class ByteLevelDecoder:
    """Decodes byte-level BPE, where a text's bytes are its tokens' bytes: exact, and without a window."""

    def __init__(self, token_bytes: TokenBytes, skip: frozenset[int], context: Sequence[int]) -> None:
        self._bytes = token_bytes
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.push(_last(context, skip))

    def push(self, token_ids: Sequence[int]) -> str:
        """See `IncrementalDecoder`."""
        bytes_of, skip = self._bytes, self._skip
        return self._utf8.decode(b"".join([bytes_of[each] for each in token_ids if each not in skip]))

    def flush(self) -> str:
        """See `IncrementalDecoder`."""
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """Decodes every other tokenizer: compares the last tokens' text with and without the new one.

    The window starts with the tokens of the last text returned, because decoders treat the first token of a
    text differently, for example drop its blank.
    """

    def __init__(self, backend: Backend, skip: frozenset[int], context: Sequence[int]) -> None:
        self._backend = backend
        self._skip = skip
        self._window = _last(context, skip)
        self._shown = len(self._window)
        self._shown_text = self._decode(self._window)

    def push(self, token_ids: Sequence[int]) -> str:
        """See `IncrementalDecoder`."""
        return "".join(map(self._push_one, token_ids))

    def _push_one(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._shown < HELD_TOKENS:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """See `IncrementalDecoder`."""
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        if text.startswith(self._shown_text):
            new = text[len(self._shown_text) :]
        else:  # broken bytes changed the text of earlier tokens, which was returned already
            new = self._decode(self._window[self._shown :])
        if new:
            del self._window[: self._shown]
            self._shown = len(self._window)
            self._shown_text = self._decode(self._window)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=False)


def _last(context: Sequence[int], skip: frozenset[int]) -> list[int]:
    tail = context[-8 * CONTEXT_TOKENS :]  # special tokens come in twos and threes
    return [token_id for token_id in tail if token_id not in skip][-CONTEXT_TOKENS:]


def _decoder_kinds(decoder: dict[str, Any] | None) -> list[str]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [kind for inner in decoder["decoders"] for kind in _decoder_kinds(inner)]
    return [decoder["type"]]
