"""From `StructuredOutputs` to a grammar in llguidance's format, or an error that names the place.

llguidance bounds the work for a grammar and for each token, so that none takes more than some tens of
milliseconds; see `LIMITS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, StructTag, TokenizerWrapper, grammar_from

from ullm.errors import InvalidParameter
from ullm.grammars.endless import endless_reference, schema_objects
from ullm.grammars.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LIMITS = LLParserLimits(
    max_lexer_states=50_000, initial_lexer_fuel=200_000, max_grammar_size=12_000, verbose_errors=False
)
"""llguidance's own limits, but for three: a lexer's states take 1 to 2 kB each, and a worker's step waits for
the compilation of a grammar that is new to it, which could take seconds."""

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""White space between JSON's tokens. A bound, since small models go on with it for ever."""

MAX_LOCATED = 200
"""Parts of a schema that are tried, to find the one that is wrong."""

_FORMAT_UNKNOWN = re.compile(r"Unknown format: (.+)")
_SCHEMAS_BY_NAME = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
_SCHEMAS_IN_LIST = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains")
_DEFINITIONS = ("$defs", "definitions")


def compile_grammar(outputs: StructuredOutputs, special_tokens: Sequence[str] = ()) -> str:
    """Return the grammar in llguidance's format, checked. Takes milliseconds; without the interpreter's lock.

    Args:
        special_tokens: the special tokens that a grammar may name, as in ``<|tool|>``.

    Raises:
        InvalidParameter: it is not a grammar, or cannot be fulfilled, or needs what is not supported.
    """
    checker = _checker(special_tokens)
    if outputs.kind in ("json", "json_object"):
        definition = _compile_schema(outputs, checker)
    else:
        definition = outputs.text if outputs.kind == "definition" else _translate(outputs)
        if error := _error(definition, checker):
            for place, schema in _schemas_within(outputs):
                _compile_schema(StructuredOutputs(json=schema, source=place), checker)
            raise _refusal(outputs, error)
    return _preceded(definition, outputs.after) if outputs.after else definition


def _preceded(definition: str, text: str) -> str:
    """Return the grammar of any text that ends with ``text``, and of what is defined, after it."""
    is_json = definition.lstrip().startswith("{")
    grammars = json.loads(definition)["grammars"] if is_json else [{"lark_grammar": definition}]
    grammars[0]["name"] = "answer"
    quoted = json.dumps(text, ensure_ascii=False)
    first = f"start: before /\\s*/ @answer\nbefore[lazy]: ANY {quoted}\nANY: /(.|\\n)*/\n"
    return json.dumps({"grammars": [{"lark_grammar": first}, *grammars]})


def _compile_schema(outputs: StructuredOutputs, checker: LLTokenizer) -> str:
    schema = _loads(outputs)
    if not isinstance(schema, dict | bool):
        raise _refusal(outputs, f"a JSON schema is an object, not {outputs.text[:40]}")
    if (bound := _inexact_bound(schema)) is not None:
        raise _refusal(outputs, f"at {bound}: whole numbers of this size are not told apart")
    if (place := _rebased_reference(schema)) is not None:
        raise _refusal(outputs, f"at {place}: $id beside $ref is not supported; leave out $id")
    while True:
        definition = _of_schema(schema, outputs)
        error = _error(definition, checker)
        unknown = _FORMAT_UNKNOWN.fullmatch(error)
        if not unknown or not _drop_format(schema, unknown[1]):
            break
    if not error and (reference := _endless(schema, outputs)) is not None:
        raise _refusal(
            outputs,
            f"at {reference}: each value of it has another one within, without end; allow null there, or "
            "leave it out of required",
        )
    if error:
        place = _locate(schema, outputs, checker)
        raise _refusal(outputs, f"at {place}: {error}" if place else error)
    return definition


def _of_schema(schema: Any, outputs: StructuredOutputs) -> str:
    if outputs.disable_any_whitespace:
        options: JsonCompileOptions = {"whitespace_flexible": False}
    else:
        options = {"whitespace_pattern": outputs.whitespace_pattern or WHITESPACE}
    if isinstance(schema, bool):  # options go into an object only
        schema = {"allOf": [schema]}
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=options)
    except (ValueError, RecursionError) as error:
        raise _refusal(outputs, str(error) or "it is nested too deeply") from None


def _rebased_reference(schema: Any) -> str | None:
    """Return the place of a ``$ref`` beside an ``$id``, if any: what it refers to depends on the draft."""
    for place, part in schema_objects(schema):
        if place and isinstance(part.get("$ref"), str) and isinstance(part.get("$id"), str):
            return place
    return None


def _endless(schema: Any, outputs: StructuredOutputs) -> str | None:
    """Return a reference without end, if the schema has no value that ends.

    Raises:
        InvalidParameter: the schema is nested too deeply.
    """
    try:
        return endless_reference(schema)
    except RecursionError:
        raise _refusal(outputs, "it is nested too deeply") from None


def _inexact_bound(schema: Any) -> str | None:
    """Return the place of a bound that llguidance rounds to a weaker one, if any.

    It keeps bounds as floating point numbers, within those of 64 bits.
    """
    for place, part in schema_objects(schema):
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            bound = part.get(name)
            if type(bound) is not int or abs(bound) <= 2**53:
                continue
            kept = max(-(2**63), min(bound if abs(bound) > 2**1000 else int(float(bound)), 2**63 - 1))
            if name.startswith("exclusive") or (kept < bound if name == "minimum" else kept > bound):
                return f"{place}/{name}"
    return None


def _drop_format(schema: Any, name: str) -> bool:
    """Remove a format that llguidance does not know; return whether there was one.

    A format that is not known is an annotation (JSON Schema 2020-12, validation, 7.2.1).
    """
    found, pending = False, [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            if part.get("format") == name:
                del part["format"]
                found = True
            pending += part.values()
        elif isinstance(part, list):
            pending += part
    return found


def _locate(schema: Any, outputs: StructuredOutputs, checker: LLTokenizer) -> str:
    """Return the place of the smallest part of a schema that is refused by itself, as a JSON pointer."""
    shared = (
        {name: schema[name] for name in _DEFINITIONS if name in schema} if isinstance(schema, dict) else {}
    )
    place, part, tried = "", schema, 0
    while True:
        for name, inner in _parts(part):
            tried += 1
            if tried > MAX_LOCATED:
                return place
            alone = {**shared, **inner} if isinstance(inner, dict) and "$ref" in json.dumps(inner) else inner
            if _error(_of_schema(alone, outputs), checker):
                place, part = f"{place}/{name}", inner
                break
        else:
            return place


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """Iterate over the schemas within a schema, with the place of each.

    Definitions come first: they are wrong where they are defined, not where they are used.
    """
    if not isinstance(schema, dict):
        return
    for keyword in _SCHEMAS_BY_NAME:
        named = schema.get(keyword)
        for name, inner in named.items() if isinstance(named, dict) else ():
            yield f"{keyword}/{name.replace('~', '~0').replace('/', '~1')}", inner
    for keyword in _SCHEMAS_IN_LIST:
        listed = schema.get(keyword)
        for index, inner in enumerate(listed if isinstance(listed, list) else ()):
            yield f"{keyword}/{index}", inner
    for keyword in _SCHEMAS:
        if isinstance(schema.get(keyword), dict):
            yield keyword, schema[keyword]


def _translate(outputs: StructuredOutputs) -> str:
    kind, text = outputs.kind, outputs.text
    if kind == "structural_tag":
        return LLMatcher.grammar_from_lark(_tags(outputs))
    if kind == "choice":
        choices = (json.dumps(each, ensure_ascii=False) for each in json.loads(text))
        return LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
    try:
        return grammar_from("regex" if kind == "regex" else "grammar", text)
    except (ValueError, RecursionError) as error:
        raise _refusal(outputs, str(error) or "it is nested too deeply") from None


def _schemas_within(outputs: StructuredOutputs) -> Iterator[tuple[str, Any]]:
    """Iterate over the schemas in a grammar, with their places."""
    if outputs.kind == "structural_tag":
        name = outputs.source or "structured_outputs.structural_tag"
        for index, each in enumerate(_structural_tag(outputs).structures):
            yield f"{name}.structures[{index}].schema", each.schema
    yield from outputs.schemas.items()


class _Structure(msgspec.Struct):
    begin: str
    schema: dict[str, Any] = {}
    end: str = ""


class _StructuralTag(msgspec.Struct):
    structures: Annotated[list[_Structure], msgspec.Meta(min_length=1)]
    triggers: list[Annotated[str, msgspec.Meta(min_length=1)]]


def _tags(outputs: StructuredOutputs) -> str:
    """Return the Lark grammar of vLLM's structural tags."""
    tag, tags = _structural_tag(outputs), []
    for each in tag.structures:
        trigger = next((trigger for trigger in tag.triggers if each.begin.startswith(trigger)), None)
        if trigger is None:
            raise _refusal(outputs, f"no trigger begins {each.begin!r}")
        tags.append(StructTag(trigger=trigger, begin=each.begin, grammar=each.schema, end=each.end))
    # A trigger such as <tool> is text here; grammars can name special tokens.
    return StructTag.to_grammar(tags, assume_special=False)


def _structural_tag(outputs: StructuredOutputs) -> _StructuralTag:
    try:
        return msgspec.convert(_loads(outputs), _StructuralTag)
    except msgspec.ValidationError as error:
        raise _refusal(outputs, str(error)) from None


def _loads(outputs: StructuredOutputs) -> Any:
    try:
        return json.loads(outputs.text)
    except (ValueError, RecursionError) as error:
        raise _refusal(outputs, f"not JSON: {error}") from None


def _error(definition: str, checker: LLTokenizer) -> str:
    """Return what is wrong with a grammar; empty if nothing is."""
    matcher = LLMatcher(checker, definition, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # some errors come with the first token only
    message: str = matcher.get_error()
    if message.startswith("NoExtensionBias"):
        return "nothing can fulfil it; maybe it refers to nothing but itself"
    return message.removesuffix("<non-verbose/>")


def _refusal(outputs: StructuredOutputs, error: str) -> InvalidParameter:
    text = " ".join(error.split())
    return outputs.refusal(f"cannot be used: {text if len(text) <= 400 else text[:400] + '…'}")


class _Bytes:
    """A tokenizer of bytes and some special tokens: enough to check a grammar, and made in a millisecond."""

    bos_token_id = None

    def __init__(self, special_tokens: Sequence[str]) -> None:
        end = "<|end|>"
        names = [end, *(name for name in special_tokens if name != end)]
        self.tokens = [bytes([byte]) for byte in range(256)] + [name.encode() for name in names]
        self.eos_token_id = 256
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _checker(special_tokens: Sequence[str]) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes(special_tokens)), slices=[])
