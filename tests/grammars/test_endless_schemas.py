"""Schemas whose every value has another one within are refused by the reference; others are not."""

from __future__ import annotations

from typing import Any

import pytest

from ullm.errors import InvalidParameter
from ullm.grammars.compiler import compile_grammar
from ullm.grammars.endless import MOST_REFERENCES, endless_reference
from ullm.grammars.structured_outputs import StructuredOutputs

NODE = {"$ref": "#/$defs/n"}


def tree(**changes: Any) -> dict[str, Any]:
    """A schema of nodes, each of which has a part that is changed."""
    node = {"type": "object", "properties": {"next": NODE}, "required": ["next"]} | changes
    return NODE | {"$defs": {"n": node}}


@pytest.mark.parametrize(
    "schema",
    [
        tree(),
        tree(type=["object"]),
        tree(properties={"next": {"type": "array", "items": NODE, "minItems": 1}}),
        tree(properties={"next": {"type": "array", "prefixItems": [True, NODE], "minItems": 2}}),
        tree(properties={"next": {"anyOf": [NODE, {"type": "array", "items": NODE, "minItems": 1}]}}),
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/a"}},
            "required": ["a"],
            "$defs": {
                "a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}, "required": ["b"]},
                "b": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]},
            },
        },
        {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
    ],
    ids=["required", "list", "items", "prefix", "choice", "two", "root"],
)
def test_endless(schema: dict[str, Any]) -> None:
    assert endless_reference(schema) is not None
    with pytest.raises(InvalidParameter, match=r"^structured_outputs.json .*at #.*without end; allow null"):
        compile_grammar(StructuredOutputs(json=schema))


@pytest.mark.parametrize(
    "schema",
    [
        tree(required=[]),
        tree(properties={"next": {"anyOf": [NODE, {"type": "null"}]}}),
        tree(properties={"next": {"type": "array", "items": NODE}}),
        tree(properties={"next": {"type": "array", "items": NODE, "minItems": 0}}),
        tree(type=["object", "null"]),
        tree(properties={"next": {"const": {"$ref": "#/$defs/n"}}}),
        {"type": "object", "properties": {"x": {"$ref": "#/$defs/none"}}, "required": ["x"]},
        {"anyOf": [{"type": "integer"}, NODE], "$defs": tree()["$defs"]},
        {"type": "object", "properties": {"a~/b": {"type": "string"}, "c": {"$ref": "#/properties/a~0~1b"}}},
        True,
    ],
)
def test_not_endless(schema: Any) -> None:
    assert endless_reference(schema) is None


def test_a_schema_of_many_references_is_left_alone() -> None:
    names = [f"d{number}" for number in range(MOST_REFERENCES + 1)]
    loops = {name: {"$ref": f"#/$defs/{name}"} for name in names}
    assert endless_reference({"allOf": list(loops.values()), "$defs": loops}) is None
    few = dict(list(loops.items())[:MOST_REFERENCES])
    assert endless_reference({"allOf": list(few.values()), "$defs": few}) is not None
