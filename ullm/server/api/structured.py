"""The form of the answer, by whatever field a request asks for it: OpenAI's, vLLM's and llama.cpp's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ullm.errors import InvalidParameter
from ullm.grammars.structured_outputs import StructuredOutputs
from ullm.sampling import structured_outputs
from ullm.server.api import schemas

_FIELDS: Mapping[str, str] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
    "json_schema": "json",
    "grammar": "grammar",
}
"""vLLM's older fields and llama.cpp's → the argument of `StructuredOutputs` that each stands for."""


def requested_form(request: schemas.GenerationRequest) -> StructuredOutputs | None:
    """Return the form that a request asks for; None if it asks for none.

    Raises:
        InvalidParameter: it asks for several, or for one that there is not; names the field.
    """
    found: dict[str, StructuredOutputs] = {}
    if request.structured_outputs is not None:
        found["structured_outputs"] = structured_outputs(request.structured_outputs)
    if (form := _of_response_format(request.response_format)) is not None:
        found["response_format"] = form
    for name, kind in _FIELDS.items():
        value = getattr(request, name)
        if value is not None:
            given = {kind: value, "whitespace_pattern": request.guided_whitespace_pattern, "source": name}
            found[name] = structured_outputs(given)
    if len(found) > 1:
        raise InvalidParameter(f"{' and '.join(found)} both say the form of the answer", list(found)[1])
    return next(iter(found.values()), None)


def _of_response_format(given: schemas.ResponseFormat | None) -> StructuredOutputs | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object" and given.schema is not None:
        return StructuredOutputs(json=given.schema, source="response_format.schema")
    if given.type == "json_object":
        return StructuredOutputs(json_object=True, source="response_format")
    if given.type == "json_schema":
        return StructuredOutputs(json=_schema(given.json_schema), source="response_format.json_schema.schema")
    if given.type == "structural_tag":
        tag = {"structures": given.structures or [], "triggers": given.triggers or []}
        return StructuredOutputs(structural_tag=tag, source="response_format")
    raise InvalidParameter(
        f"response_format.type must be text, json_object, json_schema or structural_tag, not {given.type!r}",
        "response_format",
    )


def _schema(given: dict[str, Any] | None) -> Any:
    schema = None if given is None else given.get("schema")
    if not isinstance(schema, dict | bool):
        place = "response_format.json_schema" + ("" if given is None else ".schema")
        raise InvalidParameter(f"{place} is missing, or is no object", "response_format")
    return schema
