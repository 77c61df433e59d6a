"""The one table of routes: what the apps serve, who may call it, and what the documents say about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ullm.engine import status
from ullm.server.api import responses, schemas
from ullm.server.api.route import Access, Needs, Route
from ullm.server.routes import admin, backend, chat, completions, inference, models, probes

_CHANGE = (409, 500, 503)
"""Statuses of the errors of a change of the engine."""

PROBES = (
    Route(
        "GET",
        "/live",
        probes.live,
        "Liveness: 503 once the engine has failed.",
        access=Access.OPEN,
        answer=responses.Liveness,
        verdict=True,
    ),
    Route(
        "GET",
        "/ready",
        probes.ready,
        "Readiness: 200 while new requests are admitted.",
        access=Access.OPEN,
        answer=responses.Liveness,
        verdict=True,
    ),
    Route(
        "GET",
        "/health",
        probes.show_health,
        "The state in detail; 503 while not ready.",
        access=Access.OPEN,
        answer=status.Health,
        verdict=True,
    ),
    Route(
        "GET",
        "/is_sleeping",
        probes.is_sleeping,
        "Sleep state and level.",
        access=Access.OPEN,
        answer=responses.Sleeping,
    ),
    Route(
        "GET",
        "/version",
        probes.version,
        "The server's version.",
        access=Access.OPEN,
        answer=responses.Version,
    ),
    Route(
        "GET",
        "/metrics",
        probes.scrape,
        "Prometheus metrics.",
        access=Access.OPEN,
        media_type="text/plain",
    ),
)
"""Routes of the server and of the admin listener."""

API = (
    Route(
        "POST",
        "/v1/chat/completions",
        chat.chat_completions,
        "Answer a conversation.",
        needs=Needs.ADMISSION,
        request=schemas.ChatCompletionRequest,
        answer=responses.ChatCompletion,
        event=responses.ChatCompletionChunk,
        errors=(404,),
    ),
    Route(
        "POST",
        "/v1/completions",
        completions.completions,
        "Continue prompts.",
        needs=Needs.ADMISSION,
        request=schemas.CompletionRequest,
        answer=responses.TextCompletion,
        event=responses.TextCompletion,
        errors=(404,),
    ),
    Route(
        "POST",
        "/inference",
        inference.inference,
        "Continue one prompt; a simpler form of `/v1/completions`.",
        needs=Needs.ADMISSION,
        request=schemas.InferenceRequest,
        answer=responses.Inference,
    ),
    Route("GET", "/v1/models", models.list_models, "The models that are served.", answer=responses.ModelList),
    Route(
        "GET",
        "/v1/models/{model}",
        models.show_model,
        "One model.",
        answer=responses.ModelCard,
        errors=(404,),
    ),
    Route(
        "POST",
        "/tokenize",
        models.tokenize,
        "Text to token ids.",
        needs=Needs.MODEL,
        request=schemas.TokenizeRequest,
        answer=responses.Tokenized,
        errors=(404,),
    ),
    Route(
        "POST",
        "/detokenize",
        models.detokenize,
        "Token ids to text.",
        needs=Needs.MODEL,
        request=schemas.DetokenizeRequest,
        answer=responses.Detokenized,
        errors=(404,),
    ),
    Route(
        "GET",
        "/backend",
        backend.backend,
        "The model, its workers and the versions of the packages.",
        answer=responses.BackendInfo,
    ),
    Route("GET", "/openapi.json", probes.openapi, "The OpenAPI document.", access=Access.OPEN),
)
"""Routes of the server only."""


ADMIN = (
    Route(
        "POST",
        "/sleep",
        admin.sleep,
        "Put the engine to sleep, which gives memory back.",
        access=Access.ADMIN,
        request=schemas.SleepRequest,
        optional=True,
        in_query=True,
        answer=status.SleepHealth,
        errors=_CHANGE,
    ),
    *(
        Route(
            "POST",
            path,
            admin.wake,
            "Wake the engine.",
            access=Access.ADMIN,
            request=schemas.WakeRequest,
            optional=True,
            answer=status.SleepHealth,
            errors=_CHANGE,
        )
        for path in ("/wake", "/wake_up")
    ),
    Route(
        "POST",
        "/admin/shutdown",
        admin.shutdown,
        "Drain and stop.",
        access=Access.ADMIN,
        request=schemas.ShutdownRequest,
        optional=True,
        answer=responses.Stopping,
    ),
    Route(
        "POST",
        "/admin/reload",
        admin.reload,
        "Reload the model, or load another, in new workers.",
        access=Access.ADMIN,
        request=schemas.ReloadRequest,
        optional=True,
        answer=status.ReloadReport,
        errors=_CHANGE,
    ),
    Route(
        "GET",
        "/admin/tree",
        admin.show_tree,
        "The supervision tree.",
        access=Access.ADMIN,
        answer=responses.Tree,
    ),
    Route(
        "GET",
        "/admin/faults",
        admin.show_faults,
        "The faults that are armed and those that have happened.",
        access=Access.ADMIN,
    ),
    Route(
        "POST",
        "/admin/faults",
        admin.arm_faults,
        "Arm a fault plan.",
        access=Access.ADMIN,
        request=schemas.FaultsRequest,
    ),
    Route(
        "DELETE",
        "/admin/faults",
        admin.clear_faults,
        "Disarm all faults.",
        access=Access.ADMIN,
    ),
)
"""Routes that change the engine or look inside, on the server and on the admin listener."""

ROUTES: tuple[Route, ...] = (*API, *PROBES, *ADMIN)
ADMIN_ROUTES: tuple[Route, ...] = (*PROBES, *ADMIN)


def access_of(path: str) -> Access:
    """Return who may call a path; one that no route has is closed like its neighbours."""
    declared = next((route.access for route in ROUTES if route.path == path), None)
    if declared is not None:
        return declared
    return Access.ADMIN if path == "/admin" or path.startswith("/admin/") else Access.KEY


class RouteRow(NamedTuple):
    """One line of the HTTP reference."""

    method: str
    path: str
    access: str
    summary: str
    fields: tuple[str, ...]


def reference_rows() -> Iterator[RouteRow]:
    """Yield a line per route for the HTTP reference in the docs."""
    for route in ROUTES:
        yield RouteRow(route.method, route.path, route.access.value, route.summary, route.fields)


def reference_table() -> str:
    """Return the lines of `reference_rows` as a table in Markdown."""
    lines = ["| method | path | access | what | request fields |", "|---|---|---|---|---|"]
    for row in reference_rows():
        fields = ", ".join(f"`{name}`" for name in row.fields)
        lines.append(f"| {row.method} | `{row.path}` | {row.access} | {row.summary} | {fields} |")
    return "\n".join(lines) + "\n"
