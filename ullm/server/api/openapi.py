"""``/openapi.json``: every route of the table, with its schemas and each status that it can answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

import ullm
from ullm.server.api.route import Access, Route

DESCRIPTIONS = {
    200: "The answer.",
    400: "The request cannot be served as it is; `param` names the field.",
    401: "The key is missing or wrong.",
    403: "Admin endpoints that are closed, a strange web page or host; the message says how to open them.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    409: "Another change of the engine overtook this one.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The queue is full; `Retry-After` says when to come back.",
    500: "The engine failed.",
    503: "The engine is starting, restarting, asleep, or stopping; `Retry-After` says when to come back.",
    529: "The same as 503, on the routes of Anthropic's API.",
}
"""Status → its meaning, for the documents."""

_REF = "#/components/schemas/{name}"
_BEARER = {"type": "http", "scheme": "bearer"}
_KEY_HEADER = {"type": "apiKey", "in": "header", "name": "X-Api-Key"}
_PARAMETER = re.compile(r"\{(\w+)\}")


def openapi_document(routes: Sequence[Route], *, secured: bool = False) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of an app's routes.

    Args:
        secured: an API key is needed. The admin endpoints need a key of their own in any case.
    """
    _, components = msgspec.json.schema_components(list(_schemas(routes)), ref_template=_REF)
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, components, secured)
    schemes = {"admin": _BEARER} | ({"key": _BEARER, "key_header": _KEY_HEADER} if secured else {})
    return {
        "openapi": "3.1.0",
        "info": {"title": "ullm", "version": ullm.__version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": schemes},
    }


def _schemas(routes: Sequence[Route]) -> Iterator[Any]:
    for route in routes:
        yield from (each for each in (route.request, route.answer, route.event) if each is not None)
        yield route.error


def _operation(route: Route, components: dict[str, Any], secured: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": route.summary, "responses": _responses(route, secured)}
    parameters = [*_path_parameters(route), *_query_parameters(route, components)]
    if parameters:
        operation["parameters"] = parameters
    if route.request is not None:
        operation["requestBody"] = {"required": not route.optional, "content": _json(_ref(route.request))}
    if route.access is Access.ADMIN:
        operation["security"] = [{"admin": []}]
    elif route.access is Access.KEY and secured:
        operation["security"] = [{"key": []}, {"key_header": []}]
    return operation


def _responses(route: Route, secured: bool) -> dict[str, Any]:
    schema = _answer_schema(route)
    content = {route.media_type: {"schema": schema}}
    if route.event is not None:
        content["text/event-stream"] = {"schema": _event(route.event, route.error)}
    if route.verdict:
        return {
            "200": {"description": "Yes.", "content": content},
            "503": {"description": "No.", "content": content},
        }
    responses = {"200": {"description": DESCRIPTIONS[200], "content": content}}
    for status in route.error_statuses(secured=secured):
        responses[str(status)] = {"description": DESCRIPTIONS[status], "content": _json(_ref(route.error))}
    return responses


def _answer_schema(route: Route) -> dict[str, Any]:
    if route.answer is not None:
        return _ref(route.answer)
    return {"type": "object" if route.media_type == "application/json" else "string"}


def _path_parameters(route: Route) -> Iterator[dict[str, Any]]:
    for name in _PARAMETER.findall(route.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _query_parameters(route: Route, components: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the request's fields as parameters; in a query there is no null."""
    if route.request is None or not route.in_query:
        return
    for name, schema in components[route.request.__name__]["properties"].items():
        (value,) = (each for each in schema["anyOf"] if each.get("type") != "null")
        yield {"name": name, "in": "query", "schema": value}


def _ref(schema: Any) -> dict[str, str]:
    return {"$ref": _REF.format(name=schema.__name__)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _event(schema: Any, error: Any) -> dict[str, Any]:
    chunk = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(schema), _ref(error)]},
    }
    data = {"anyOf": [{"const": "[DONE]"}, chunk]}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}
