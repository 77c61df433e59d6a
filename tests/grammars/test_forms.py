"""The form of an answer as a request says it: what is taken, and what is refused with its place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ullm.errors import InvalidParameter
from ullm.grammars.compiler import compile_grammar
from ullm.grammars.structured_outputs import MAX_GRAMMAR_CHARS, StructuredOutputs
from ullm.sampling import SamplingParams

TAG = {"structures": [{"begin": "<f=a>", "schema": {"type": "object"}, "end": "</f>"}], "triggers": ["<f="]}


@pytest.mark.parametrize(
    "given",
    [
        {"json": {"type": "object"}},
        {"json": '{"type": "object"}', "whitespace_pattern": " ?"},
        {"json": True, "disable_any_whitespace": True},
        {"json_object": True},
        {"regex": "[a-z]+"},
        {"choice": ["yes", 'n"o', "é😀\n"]},
        {"grammar": 'start: "a" <tool> /b+/'},
        {"grammar": 'root ::= "yes" | "no" [0-9]+'},
        {"structural_tag": TAG},
        {"structural_tag": json.dumps(TAG)},
        {"definition": '{"grammars": [{"lark_grammar": "start: /a/"}]}'},
    ],
)
def test_every_kind_is_compiled(given: dict[str, Any]) -> None:
    outputs = StructuredOutputs(**given)
    assert compile_grammar(outputs, ["<tool>"])
    assert outputs.kind in given
    assert SamplingParams(structured_outputs=given).structured_outputs == outputs  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "exactly one of"),
        ({"json_object": False}, "exactly one of"),
        ({"json": {}, "regex": "a"}, "got json and regex"),
        ({"json": [1]}, "structured_outputs.json must not be a list"),
        ({"json": {"const": object()}}, "structured_outputs.json cannot be written as JSON"),
        ({"regex": 3}, "structured_outputs.regex must not be a int"),
        ({"choice": []}, "structured_outputs.choice must be a list of texts"),
        ({"choice": "yes"}, "structured_outputs.choice must be a list of texts"),
        ({"choice": ["a", ""]}, "structured_outputs.choice must be a list of texts"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, f"at most {MAX_GRAMMAR_CHARS}"),
        ({"json": {}, "whitespace_pattern": 3}, "whitespace_pattern must be a text"),
        ({"json": {}, "source": "guided_json", "regex": "a"}, "guided_json takes exactly one"),
    ],
)
def test_values_that_are_refused_at_once(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidParameter, match=told):
        StructuredOutputs(**given)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"json": "{"}, "not JSON"),
        ({"json": "[" * 100_000}, "not JSON"),
        ({"json": nested(600)}, "recursion"),
        ({"json": False}, "schema is false"),
        ({"json": {"properties": {"a": {"type": "strng"}}}}, "at /properties/a: Invalid type: strng"),
        (
            {"json": {"items": {"anyOf": [{"type": "null"}, {"pattern": "("}]}}},
            "at /items/anyOf/1: regex parse error",
        ),
        ({"json": {"prefixItems": [{"uniqueItems": True}]}}, "at /prefixItems/0: Unimplemented keys"),
        ({"json": {"minimum": 5, "maximum": 3, "type": "integer"}}, "Unsatisfiable schema"),
        ({"json": {"$ref": "#/nowhere"}}, "does not exist"),
        (
            {"json": {"$defs": {"a": {}}, "items": {"$id": "b/", "$ref": "#/$defs/a"}}},
            r"at /items: \$id beside \$ref",
        ),
        (
            {"json": {"$defs": {"x/y": {"not": {}}}, "properties": {"a": {"$ref": "#/$defs/x~1y"}}}},
            "at /[$]defs/x~1y: Unimplemented",
        ),
        ({"regex": "[a-z"}, "unclosed character class"),
        ({"regex": "(?=a)"}, "look-around"),
        ({"grammar": "start: <nope>"}, "unknown special token"),
        ({"grammar": "what is this"}, "Expected ::="),
        ({"grammar": "start: missing"}, "missing"),
        ({"structural_tag": "[]"}, "Expected `object`"),
        ({"structural_tag": {"structures": 3, "triggers": []}}, "structures"),
        ({"structural_tag": {**TAG, "triggers": ["<g"]}}, "no trigger begins '<f=a>'"),
        ({"structural_tag": {**TAG, "triggers": [""]}}, "triggers"),
        ({"definition": "{}"}, "missing field"),
    ],
)
def test_grammars_that_cannot_be_used_are_told_with_the_place(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidParameter, match=told) as caught:
        compile_grammar(StructuredOutputs(**given), ["<tool>"])
    assert "\n" not in str(caught.value)
    assert caught.value.param == "structured_outputs"


def test_errors_name_the_field_that_was_sent() -> None:
    outputs = StructuredOutputs(json={"type": "x"}, source="response_format.json_schema.schema")
    with pytest.raises(InvalidParameter, match=r"^response_format\.json_schema\.schema cannot") as caught:
        compile_grammar(outputs)
    assert caught.value.param == "response_format"


def test_an_id_beside_a_reference_is_refused_only_where_it_changes_the_base() -> None:
    names = {"$id": {"type": "string"}, "$ref": {"enum": [{"$id": "a", "$ref": "b"}]}}
    root = {"$id": "https://example.com/a", "$ref": "#/$defs/a", "$defs": {"a": {"properties": names}}}
    compile_grammar(StructuredOutputs(json=root))


def test_formats_that_nobody_knows_are_annotations() -> None:
    schema = {"properties": {"a": {"type": "string", "format": "password"}, "b": {"format": "date"}}}
    compiled = compile_grammar(StructuredOutputs(json=schema))
    assert "password" not in compiled
    assert '"date"' in compiled
    assert schema["properties"]["a"]["format"] == "password", "the caller's schema stays as it is"


@pytest.mark.parametrize("value", ["{}", 3, [{}], {"jsn": {}}, {"regex": "a", "x": 1}])
def test_sampling_params_refuse_what_is_no_form(value: Any) -> None:
    with pytest.raises(InvalidParameter, match="structured_outputs"):
        SamplingParams(structured_outputs=value)
