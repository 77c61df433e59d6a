"""The form of an answer as a request says it: what is taken, and what is refused with its place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ullm.errors import InvalidParameter
from ullm.grammars.compiler import LIMITS, compile_grammar
from ullm.grammars.structured_outputs import MAX_GRAMMAR_CHARS, StructuredOutputs
from ullm.parsing.formats import FORMATS, forced_calls, guided_calls
from ullm.sampling import SamplingParams

BAD = {"properties": {"a": {"type": "strng"}}}
TAG: dict[str, Any] = {
    "structures": [{"begin": "<f=a>", "schema": {"type": "object"}, "end": "</f>"}],
    "triggers": ["<f="],
}


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
        ({"json": {"$ref": "#"}}, "nothing can fulfil it; maybe it refers to nothing but itself"),
        ({"json": {"properties": {f"p{i}": {} for i in range(4000)}}}, r"too big \(limit"),
        ({"json": {"items": {"minimum": 10**30}}}, "at /items/minimum: whole numbers of this size"),
        ({"json": {"type": "integer", "maximum": 2**53 + 3}}, "at /maximum: whole numbers of this size"),
        (
            {"json": {"type": "integer", "exclusiveMaximum": -(10**400)}},
            "at /exclusiveMaximum: whole numbers",
        ),
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
        ({"grammar": "start: start"}, "nothing can fulfil it"),
        (
            {
                "structural_tag": {
                    **TAG,
                    "structures": [*TAG["structures"], {"begin": "<f=b>", "schema": BAD}],
                }
            },
            r"^structured_outputs\.structural_tag\.structures\[1\]\.schema .* at /properties/a: Invalid type",
        ),
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


@pytest.mark.parametrize("bounds", [{"minimum": 2**53}, {"maximum": 2**63 - 1}, {"minimum": 0.5}])
def test_bounds_of_whole_numbers_that_are_kept(bounds: dict[str, Any]) -> None:
    assert compile_grammar(StructuredOutputs(json={"type": "integer", **bounds}))


@pytest.mark.parametrize("form", [forced_calls, guided_calls], ids=["forced", "guided"])
def test_a_tool_that_cannot_be_used_is_named_with_the_place(form: Any) -> None:
    for name in FORMATS:
        with pytest.raises(InvalidParameter) as caught:
            compile_grammar(form(name, {"f": {"type": "object"}, "g": BAD}, several=True))
        told = str(caught.value)
        assert told == "tools.g.parameters cannot be used: at /properties/a: Invalid type: strng"
        assert caught.value.param == "tools"


def test_great_grammars_are_bounded_before_a_worker_waits_for_them() -> None:
    assert LIMITS.max_grammar_size <= 12_000
    assert LIMITS.initial_lexer_fuel <= 200_000
    compile_grammar(
        StructuredOutputs(json={"properties": {f"p{i}": {"type": "integer"} for i in range(1000)}})
    )


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
