"""``/openapi.json``: every route, with its schemas and each status that it can answer."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
from quart import Response
from quart_trio import QuartTrio

import ullm
from ullm.config import SleepMode
from ullm.engine import status as health
from ullm.server.api import responses, schemas

_REF = "#/components/schemas/{name}"
_DESCRIPTIONS = {
    200: "The answer.",
    400: "The request cannot be served as it is; `param` names the field.",
    401: "The key is missing or wrong.",
    403: "The admin endpoints are closed; the message says how to open them.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    409: "Another change of the engine overtook this one.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The queue is full; `Retry-After` says when to come back.",
    500: "The engine failed.",
    503: "The engine is starting, restarting, asleep, or stopping; `Retry-After` says when to come back.",
}
_BODY = (400, 404, 408, 413, 415)
_GENERATE = (*_BODY, 429, 500, 503)
_CHANGE = (409, 500, 503)
_ADMIN_BODY = (400, 408, 413, 415)

_BEARER = {"type": "http", "scheme": "bearer"}
_COMPONENTS: tuple[Any, ...] = (
    schemas.CompletionRequest,
    schemas.ChatCompletionRequest,
    schemas.TokenizeRequest,
    schemas.DetokenizeRequest,
    schemas.InferenceRequest,
    schemas.SleepRequest,
    schemas.ShutdownRequest,
    schemas.ReloadRequest,
    schemas.FaultsRequest,
    responses.Completion,
    responses.ChatCompletion,
    responses.ChatCompletionChunk,
    responses.ModelCard,
    responses.ModelList,
    responses.Tokenized,
    responses.Detokenized,
    responses.Version,
    responses.Liveness,
    responses.Sleeping,
    responses.Inference,
    responses.Backend,
    responses.Stopping,
    responses.Tree,
    health.Health,
    health.SleepHealth,
    health.ReloadReport,
    responses.ErrorBody,
)


def install(app: QuartTrio, *, secured: bool) -> None:
    """Add the route to ``app``; the document is built when it is first asked for."""
    built: list[bytes] = []

    async def document() -> Response:
        if not built:
            built.append(msgspec.json.encode(openapi_document(secured=secured)))
        return Response(built[0], content_type="application/json")

    app.get("/openapi.json")(document)


def openapi_document(*, secured: bool = False) -> dict[str, Any]:
    """The OpenAPI 3.1 document.

    Args:
        secured: an API key is needed. The admin endpoints need a key of their own in any case.
    """
    _, components = msgspec.json.schema_components(_COMPONENTS, ref_template=_REF)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "ullm", "version": ullm.__version__},
        "paths": _paths(secured),
        "components": {"schemas": components, "securitySchemes": {"admin": _BEARER}},
    }
    if secured:
        document["components"]["securitySchemes"]["key"] = _BEARER
    return document


def _paths(secured: bool) -> dict[str, Any]:
    model = _get("One model.", responses.ModelCard, (404,), secured)
    model["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    ]
    return {
        "/v1/models": {"get": _get("The models that are served.", responses.ModelList, (), secured)},
        "/v1/models/{model}": {"get": model},
        "/v1/completions": {
            "post": _post(
                "Continue prompts.",
                schemas.CompletionRequest,
                responses.Completion,
                _GENERATE,
                secured,
                responses.Completion,
            )
        },
        "/v1/chat/completions": {
            "post": _post(
                "Answer a conversation.",
                schemas.ChatCompletionRequest,
                responses.ChatCompletion,
                _GENERATE,
                secured,
                responses.ChatCompletionChunk,
            )
        },
        "/tokenize": {
            "post": _post(
                "Text to token ids.", schemas.TokenizeRequest, responses.Tokenized, (*_BODY, 503), secured
            )
        },
        "/detokenize": {
            "post": _post(
                "Token ids to text.", schemas.DetokenizeRequest, responses.Detokenized, (*_BODY, 503), secured
            )
        },
        "/inference": {
            "post": _post(
                "Continue a prompt.", schemas.InferenceRequest, responses.Inference, _GENERATE, secured
            )
        },
        "/backend": {"get": _get("What serves here, and on what.", responses.Backend, (), secured)},
        "/live": {"get": _probe("Whether the process is worth keeping.", _ref(responses.Liveness))},
        "/ready": {"get": _probe("Whether new requests are taken.", _ref(responses.Liveness))},
        "/health": {"get": _probe("The state, in detail.", _ref(health.Health))},
        "/is_sleeping": {"get": _get("Whether the engine sleeps.", responses.Sleeping, (), secured=False)},
        "/version": {"get": _get("The server's version.", responses.Version, (), secured=False)},
        "/metrics": {"get": _text("Prometheus metrics.")},
        **_admin_paths(),
    }


def _admin_paths() -> dict[str, Any]:
    sleep = _admin("Give memory back.", health.SleepHealth, _CHANGE, schemas.SleepRequest)
    sleep["parameters"] = [
        {"name": "level", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 3}},
        {"name": "mode", "in": "query", "schema": {"type": "string", "enum": list(get_args(SleepMode))}},
    ]
    wake = _admin("Be awake.", health.SleepHealth, _CHANGE)
    faults = {
        "get": _admin("The faults that are armed, and those that happened.", None),
        "post": _admin("Arm a plan of faults.", None, (), schemas.FaultsRequest, required=True),
        "delete": _admin("Disarm all faults.", None),
    }
    return {
        "/sleep": {"post": sleep},
        "/wake": {"post": wake},
        "/wake_up": {"post": wake},
        "/admin/shutdown": {
            "post": _admin("Drain and stop.", responses.Stopping, (), schemas.ShutdownRequest)
        },
        "/admin/reload": {
            "post": _admin("Load the model again.", health.ReloadReport, _CHANGE, schemas.ReloadRequest)
        },
        "/admin/tree": {"get": _admin("The supervision tree.", responses.Tree)},
        "/admin/faults": faults,
    }


def _admin(
    summary: str, answer: Any, errors: tuple[int, ...] = (), body: Any = None, *, required: bool = False
) -> dict[str, Any]:
    """An admin operation; without ``answer`` it answers with some object."""
    schema = {"type": "object"} if answer is None else _ref(answer)
    statuses = (401, 403, *errors, *(_ADMIN_BODY if body is not None else ()))
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": _answers(_json(schema), statuses, secured=False),
        "security": [{"admin": []}],
    }
    if body is not None:
        operation["requestBody"] = {"required": required, "content": _json(_ref(body))}
    return operation


def _ref(schema: Any) -> dict[str, str]:
    return {"$ref": _REF.format(name=schema.__name__)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _answers(answer: dict[str, Any], errors: tuple[int, ...], secured: bool) -> dict[str, Any]:
    found = {"200": {"description": _DESCRIPTIONS[200], "content": answer}}
    for status in (*errors, *((401,) if secured else ())):
        content = _json(_ref(responses.ErrorBody))
        found[str(status)] = {"description": _DESCRIPTIONS[status], "content": content}
    return found


def _get(summary: str, answer: Any, errors: tuple[int, ...], secured: bool) -> dict[str, Any]:
    operation = {"summary": summary, "responses": _answers(_json(_ref(answer)), errors, secured)}
    return operation | ({"security": [{"key": []}]} if secured else {})


def _post(
    summary: str, body: Any, answer: Any, errors: tuple[int, ...], secured: bool, event: Any = None
) -> dict[str, Any]:
    operation = _get(summary, answer, errors, secured)
    operation["requestBody"] = {"required": True, "content": _json(_ref(body))}
    if event is not None:
        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": _event(event)}
    return operation


def _event(schema: Any) -> dict[str, Any]:
    chunk = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(schema), _ref(responses.ErrorBody)]},
    }
    data = {"anyOf": [{"const": "[DONE]"}, chunk]}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _probe(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    found = {
        str(status): {"description": text, "content": _json(schema)}
        for status, text in ((200, "Yes."), (503, "No."))
    }
    return {"summary": summary, "responses": found}


def _text(summary: str) -> dict[str, Any]:
    content = {"text/plain": {"schema": {"type": "string"}}}
    return {"summary": summary, "responses": {"200": {"description": _DESCRIPTIONS[200], "content": content}}}
