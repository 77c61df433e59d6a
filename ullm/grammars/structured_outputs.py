"""`StructuredOutputs`: the form that an answer must have, as a request says it."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ullm.errors import InvalidParameter

MAX_GRAMMAR_CHARS = 256 * 1024
"""Maximum length of a schema or grammar; OpenAI's limit of a schema is about half of it."""

_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag", "definition")


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """The form that an answer must have; exactly one of the first seven is given. The names are vLLM's.

    Args:
        json: a JSON schema, as a dict or as JSON text; the answer is JSON that is valid by it.
        json_object: true: the answer is a JSON object.
        regex: a regular expression that the whole answer matches, in the syntax of Rust's ``regex``.
        choice: texts, of which the answer is one.
        grammar: a grammar in Lark's syntax as llguidance reads it, or in llama.cpp's GBNF.
        structural_tag: vLLM's ``{"structures": [{"begin", "schema", "end"}, …], "triggers": [text, …]}``:
            free text, in which each trigger begins a structure.
        definition: a grammar in llguidance's own format, to which the others are translated.
        whitespace_pattern: a regular expression for white space between the tokens of JSON; default: none,
            or up to 32 blanks, tabs and line ends.
        disable_any_whitespace: no white space there at all.
        after: free text, up to this text and with it, comes before the form.
        schemas: JSON schemas within a grammar, by what errors call them; looked at only to find the one that
            is wrong.
        disable_fallback: without effect; there is no other way to fall back to.
        source: what errors call it; default: ``structured_outputs`` and the name of the one that is given.

    Raises:
        InvalidParameter: none or several are given, or one is of the wrong type, or too long.
    """

    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    definition: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_fallback: bool = False
    source: str = ""
    after: str = ""
    schemas: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = self._given()
        if len(kinds) != 1:
            found = " and ".join(kinds) or "none"
            raise self.refusal(f"takes exactly one of {', '.join(_KINDS)}; got {found}")
        if self.whitespace_pattern is not None and not isinstance(self.whitespace_pattern, str):
            raise self.refusal("whitespace_pattern must be a text")
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise self.refusal(f"has {len(self.text)} characters; at most {MAX_GRAMMAR_CHARS}")

    def refusal(self, cause: str) -> InvalidParameter:
        """Return the error that says what is wrong with it."""
        kinds = self._given()
        name = self.source or ".".join(["structured_outputs", *(kinds if len(kinds) == 1 else ())])
        return InvalidParameter(f"{name} {cause}", self.param)

    @property
    def param(self) -> str:
        """The request's field that says it."""
        return self.source.partition(".")[0] or "structured_outputs"

    @property
    def kind(self) -> str:
        """The name of the one that is given."""
        return self._given()[0]

    @property
    def text(self) -> str:
        """The one that is given, as text: JSON, a regular expression, or a grammar."""
        return self._text(self.kind)

    def _given(self) -> list[str]:
        """Return the names of those that are given; ``json_object: false`` is none."""
        given = [name for name in _KINDS if getattr(self, name) is not None]
        return [name for name in given if name != "json_object" or self.json_object is not False]

    def _text(self, name: str) -> str:
        value = getattr(self, name)
        if name == "choice":
            texts = [] if isinstance(value, str) else list(value)
            if not texts or not all(isinstance(each, str) and each for each in texts):
                raise self.refusal("must be a list of texts that are not empty")
            return jsonlib.dumps(texts, ensure_ascii=False)
        if name == "json_object" and value is True:
            return '{"type": "object"}'
        if isinstance(value, Mapping | bool) and name in ("json", "structural_tag"):
            try:
                return jsonlib.dumps(value, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise self.refusal(f"cannot be written as JSON: {error}") from None
        if not isinstance(value, str):
            raise self.refusal(f"must not be a {type(value).__name__}")
        return value
