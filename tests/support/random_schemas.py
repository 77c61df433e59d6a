"""Random JSON schemas of the keywords that structured outputs support."""

from __future__ import annotations

import random
from typing import Any

PATTERNS = ("^[a-z]{1,8}$", "^[0-9]{3}-[0-9]{4}$", "^(foo|bar)+$", "^\\w{2,5}$")
FORMATS = ("date", "time", "date-time", "email", "ipv4", "uuid")
TREE = {
    "type": "object",
    "properties": {
        "v": {"type": "boolean"},
        "in": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
    },
    "required": ["v"],
    "additionalProperties": False,
}


def random_schema(draw: random.Random) -> dict[str, Any]:
    """Return a schema that some JSON is valid by, with definitions, one of which is recursive."""
    return {"$defs": {"leaf": _schema(draw, 0), "tree": TREE}, **_schema(draw, 3)}


def _schema(draw: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    if depth:
        kinds += ["object"] * 4 + ["array"] * 2 + ["anyOf", "$ref"]
    return _OF_KIND[draw.choice(kinds)](draw, depth)


def _string(draw: random.Random, depth: int) -> dict[str, Any]:
    return draw.choice(
        [
            {"type": "string"},
            {"type": "string", "maxLength": draw.randint(0, 20)},
            {"type": "string", "minLength": 1, "maxLength": draw.randint(1, 20)},
            {"type": "string", "pattern": draw.choice(PATTERNS)},
            {"type": "string", "format": draw.choice(FORMATS)},
        ]
    )


def _integer(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randint(-1000, 1000)
    bounds = {"minimum": low, "maximum": low + draw.randint(0, 5000)}
    return {"type": "integer", **draw.choice([{}, bounds, {"exclusiveMinimum": low}])}


def _number(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randint(-10, 10)
    return {"type": "number", **draw.choice([{}, {"minimum": low, "maximum": low + 0.5}])}


def _enum(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": draw.sample(["a", 'quo"te', "é", 1, 2.5, None, True, [1, "x"], {"k": None}], 3)}


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(["a", "b", "name", "a b", 'q"', "ключ", "$id", "0"], draw.randint(0, 5))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(draw, depth - 1) for name in names},
        "required": draw.sample(names, draw.randint(0, len(names))),
    }
    further = draw.choice([False, False, {"type": "integer"}])
    return {**schema, "additionalProperties": further}


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randint(0, 2)
    limits = {"minItems": low, "maxItems": low + draw.randint(0, 3)}
    if draw.random() < 0.3:
        fixed = [_schema(draw, depth - 1) for _ in range(2)]
        return {"type": "array", "prefixItems": fixed, "items": False, "minItems": 2}
    return {"type": "array", "items": _schema(draw, depth - 1), **limits}


def _any_of(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}


def _ref(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{draw.choice(['leaf', 'tree'])}"}


_OF_KIND = {
    "string": _string,
    "integer": _integer,
    "number": _number,
    "boolean": lambda draw, depth: {"type": "boolean"},
    "null": lambda draw, depth: {"type": "null"},
    "enum": _enum,
    "const": lambda draw, depth: {"const": draw.choice(["x", 0, None, [True], {"a": 1}])},
    "object": _object,
    "array": _array,
    "anyOf": _any_of,
    "$ref": _ref,
}
