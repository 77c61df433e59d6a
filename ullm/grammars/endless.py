"""JSON schemas whose every value has another one within: no answer could end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

DATA = ("const", "enum", "default", "examples")
"""Keywords whose values are no schemas."""


MOST_REFERENCES = 200
"""A schema with more is not looked through, which would take a time that grows with their square."""


def endless_reference(schema: Any) -> str | None:
    """Return a ``$ref`` whose schema has no value that ends, if the whole schema has none; else None.

    What has an end is found bottom-up: a reference does if its schema can be fulfilled by values and
    references that do. Whatever is not understood counts as having one.

    Raises:
        RecursionError: the schema is nested too deeply.
    """
    references = {part["$ref"] for _, part in schema_objects(schema) if _is_local(part.get("$ref"))}
    if len(references) > MOST_REFERENCES:
        return None
    ending: set[str] = set()
    while more := {each for each in references - ending if _ends(_target(schema, each), ending)}:
        ending |= more
    return None if _ends(schema, ending) else min(references - ending, default=None)


def schema_objects(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over the objects in a schema but for its data, each with its place."""
    pending = [("", schema)]
    while pending:
        place, part = pending.pop()
        if isinstance(part, dict):
            yield place, part
            pending += [(f"{place}/{name}", inner) for name, inner in part.items() if name not in DATA]
        elif isinstance(part, list):
            pending += [(f"{place}/{index}", inner) for index, inner in enumerate(part)]


def _is_local(reference: object) -> bool:
    return isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))


def _target(schema: Any, reference: str) -> Any:
    """Return what a local reference names; None if there is nothing."""
    part = schema
    for name in reference.removeprefix("#").split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and key.isdecimal():
            part = part[int(key)] if int(key) < len(part) else None
        else:
            part = part.get(key) if isinstance(part, dict) else None
    return part


def _ends(part: Any, ending: Collection[str]) -> bool:
    """Return whether some value of a schema has an end, if those of the references in ``ending`` have."""
    if not isinstance(part, dict) or "const" in part or "enum" in part:
        return True
    reference = part.get("$ref")
    if _is_local(reference) and reference not in ending:
        return False
    choices = [part[name] for name in ("anyOf", "oneOf") if isinstance(part.get(name), list) and part[name]]
    if not all(any(_ends(each, ending) for each in alternatives) for alternatives in choices):
        return False
    return all(_ends(each, ending) for each in _necessary(part))


def _necessary(part: dict[str, Any]) -> list[Any]:
    """Return the schemas of which each value has some within."""
    found, kind = _list(part.get("allOf")), part.get("type")
    kind = kind[0] if isinstance(kind, list) and len(kind) == 1 else kind
    if kind == "object" and isinstance(properties := part.get("properties"), dict):
        found += [properties.get(name) for name in _list(part.get("required")) if isinstance(name, str)]
    least = part.get("minItems")
    if kind == "array" and isinstance(least, int):
        first = _list(part.get("prefixItems"))[:least]
        found += first + ([part.get("items")] if least > len(first) else [])
    return found


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list) else []
