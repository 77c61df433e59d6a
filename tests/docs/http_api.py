"""Routes and fields of the HTTP API, for docs/reference/http-api.md."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec

from tests.docs.docstrings import markdown, parse, sentence, table
from tests.docs.field_notes import NOTES
from ullm.engine import status
from ullm.sampling import SamplingParams
from ullm.server.api import responses, schemas
from ullm.server.api.elsewhere import advice
from ullm.server.api.fields import FIELDS, REFUSED, FieldRule
from ullm.server.api.message_requests import MessagesRequest
from ullm.server.api.openapi import DESCRIPTIONS
from ullm.server.api.pooling_schemas import EmbeddingsRequest, RerankRequest, ScoreRequest
from ullm.server.api.response_requests import ResponsesRequest
from ullm.server.routes.table import ROUTES

Struct = type[msgspec.Struct]

OTHER_SCHEMAS: Mapping[str, Struct] = {
    "POST /tokenize": schemas.TokenizeRequest,
    "POST /detokenize": schemas.DetokenizeRequest,
    "POST /inference": schemas.InferenceRequest,
    "POST /sleep": schemas.SleepRequest,
    "POST /admin/shutdown": schemas.ShutdownRequest,
    "POST /admin/reload": schemas.ReloadRequest,
    "POST /admin/faults": schemas.FaultsRequest,
}
ANSWERS: tuple[Struct, ...] = (
    responses.Usage,
    responses.Liveness,
    status.Health,
    status.ReplicaHealth,
    status.SleepHealth,
    status.ReloadReport,
    responses.Sleeping,
    responses.Load,
    responses.BackendInfo,
    responses.Tokenized,
    responses.Detokenized,
    responses.Inference,
    responses.Stopping,
    responses.Tree,
    responses.TreeNode,
    responses.ErrorDetail,
)
"""Answers whose fields are ullm's own; those of completions are OpenAI's."""


def route_table() -> str:
    """Return a row per route."""
    return table(
        ["method", "path", "who may call it", "what it does", "errors"],
        [
            [
                route.method,
                f"`{route.path}`",
                route.access.value,
                markdown(route.summary),
                ", ".join(map(str, _statuses(route))),
            ]
            for route in ROUTES
        ],
    )


def _statuses(route: Any) -> Iterable[int]:
    return (503,) if route.verdict else route.error_statuses(secured=True)


def status_table() -> str:
    """Return a row per HTTP status: what it means."""
    return table(["status", "meaning"], [[str(code), markdown(text)] for code, text in DESCRIPTIONS.items()])


def chat_fields() -> str:
    """Return the fields of a chat completion, with those that only OpenAI's API has."""
    return _request_table(schemas.ChatCompletionRequest)


def completion_fields() -> str:
    """Return the fields of a completion, with those that only OpenAI's API has."""
    return _request_table(schemas.CompletionRequest)


def response_fields() -> str:
    """Return the fields of a response, with those that only OpenAI's API has."""
    return _request_table(ResponsesRequest)


def message_fields() -> str:
    """Return the fields of a message of Anthropic's API."""
    return _request_table(MessagesRequest)


def embedding_fields() -> str:
    """Return the fields of a request for embeddings."""
    return _request_table(EmbeddingsRequest)


def score_fields() -> str:
    """Return the fields of a request for scores."""
    return _request_table(ScoreRequest)


def rerank_fields() -> str:
    """Return the fields of a request for a ranking."""
    return _request_table(RerankRequest)


def _request_table(schema: Struct) -> str:
    known = {name: (kind, text) for name, kind, text in fields(schema)}
    rows = [_rule_row(rule, *known.get(rule.name, ("any", ""))) for rule in FIELDS[schema]]
    text = table(["field", "type", "from", "effect", "meaning"], rows)
    if found := list(advice(schema)):
        text += "\nFields of other APIs that would change the answer are refused, too:\n\n"
        text += "".join(f"- {', '.join(names)}: {note}.\n" for note, names in found)
    return text


def _rule_row(rule: FieldRule, kind: str, text: str) -> list[str]:
    meaning = sentence(markdown(rule.meaning)) or text
    return [f"`{rule.name}`", kind, rule.origin.value, rule.effect.value, meaning]


def other_fields() -> str:
    """Return the fields of the other requests, a table per route."""
    return "\n".join(
        f"### `{route}`\n\n"
        + table(["field", "type", "meaning"], [*_field_rows(schema), *_refused_rows(schema)])
        for route, schema in OTHER_SCHEMAS.items()
    )


def _field_rows(schema: Struct) -> list[list[str]]:
    return [[f"`{name}`", kind, text] for name, kind, text in fields(schema)]


def _refused_rows(schema: Struct) -> list[list[str]]:
    rules = REFUSED.get(schema, ())
    return [[f"`{rule.name}`", "any", sentence(f"refused {rule.meaning}")] for rule in rules]


def answers() -> str:
    """Return the fields of ullm's own answers, a table per schema."""
    return "\n".join(
        f"### {schema.__name__}\n\n{markdown(parse(schema).summary)}\n\n"
        + table(["field", "type", "meaning"], _field_rows(schema))
        for schema in ANSWERS
    )


def fields(schema: Struct) -> list[tuple[str, str, str]]:
    """Return name, type and meaning of each field."""
    hints = typing.get_type_hints(schema, include_extras=True)
    return [(name, type_text(hints[name]), meaning(schema, name)) for name in schema.__struct_fields__]


def meaning(schema: Struct, name: str) -> str:
    """Return what a field means: from the notes, the schema's docstring or the sampling parameters."""
    sampling = parse(SamplingParams).entries["Args"] if "temperature" in schema.__struct_fields__ else {}
    text = (
        NOTES.get((schema.__name__, name))
        or parse(schema).entries.get("Args", {}).get(name)
        or NOTES.get(("", name))
        or sampling.get(name, "")
    )
    return sentence(markdown(text)).replace("None", "null")


def type_text(hint: Any) -> str:
    """Return a type as JSON has it; optional fields do not say so, since null always means the default."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin in (typing.Union, types.UnionType):
        kinds = [type_text(each) for each in arguments if each not in (type(None), msgspec.UnsetType)]
        return " or ".join(dict.fromkeys(kinds))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is dict or hint is dict:
        return "object"
    if hint in ANSWERS:
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(hint, "object")
