"""The one table of routes: what the apps serve, who may call it, and what the documents say about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ullm.config import ServerConfig
from ullm.engine import status
from ullm.server.api import message_objects, message_requests, pooling_schemas, responses, schemas
from ullm.server.api import response_objects as objects
from ullm.server.api.response_requests import ResponsesRequest
from ullm.server.api.route import Access, Needs, Route
from ullm.server.routes import (
    admin,
    backend,
    chat,
    completions,
    inference,
    messages,
    models,
    pages,
    pooling,
    probes,
    stored_completions,
    stored_responses,
)

_CHANGE = (409, 500, 503)
"""Statuses of the errors of a change of the engine."""


def _always(config: ServerConfig, body: object) -> bool:
    return True


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
        kept=stored_completions.is_kept,
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
        kept=stored_completions.is_kept,
    ),
    *(
        route
        for path, show, delete, answer, event, deleted in (
            (
                "/v1/chat/completions/{id}",
                stored_completions.show_chat,
                stored_completions.delete_chat,
                responses.ChatCompletion,
                responses.ChatCompletionChunk,
                responses.DeletedAnswer,
            ),
            (
                "/v1/completions/{id}",
                stored_completions.show_completion,
                stored_completions.delete_completion,
                responses.TextCompletion,
                responses.TextCompletion,
                responses.DeletedAnswer,
            ),
            (
                "/v1/messages/{id}",
                stored_completions.show_message,
                stored_completions.delete_message,
                message_objects.MessageObject,
                message_objects.MessageEvent,
                message_objects.DeletedMessage,
            ),
        )
        for route in (
            Route(
                "GET",
                path,
                show,
                "With `--journal`: an answer, once it has ended; with `?stream=true&starting_after=N` its "
                "events after number N.",
                needs=Needs.MODEL,
                answer=answer,
                event=event,
                errors=(400, 404),
                kept=_always,
            ),
            Route(
                "DELETE",
                path,
                delete,
                "With `--journal`: forget an answer; one that is being made is cancelled.",
                answer=deleted,
                errors=(404, 503),
                kept=_always,
            ),
        )
    ),
    Route(
        "POST",
        "/v1/responses",
        stored_responses.create,
        "Answer, and store the answer; in the background, if asked to.",
        needs=Needs.ADMISSION,
        request=ResponsesRequest,
        answer=objects.ResponseObject,
        event=objects.ResponseEvent,
        errors=(404,),
        kept=stored_responses.is_kept,
    ),
    Route(
        "POST",
        "/v1/responses/{id}/cancel",
        stored_responses.cancel,
        "Cancel an answer in the background.",
        answer=objects.ResponseObject,
        errors=(400, 404),
        kept=_always,
    ),
    Route(
        "GET",
        "/v1/responses/{id}/input_items",
        stored_responses.input_items,
        "What a stored answer was asked with; `limit`, `after` and `order` ask for a page.",
        answer=objects.InputItems,
        errors=(404,),
        kept=_always,
    ),
    Route(
        "GET",
        "/v1/responses/{id}",
        stored_responses.show,
        "A stored answer; with `?stream=true&starting_after=N` its events after number N.",
        needs=Needs.MODEL,
        answer=objects.ResponseObject,
        event=objects.ResponseEvent,
        errors=(400, 404),
        kept=_always,
    ),
    Route(
        "DELETE",
        "/v1/responses/{id}",
        stored_responses.delete,
        "Forget a stored answer.",
        answer=objects.DeletedResponse,
        errors=(404,),
        kept=_always,
    ),
    Route(
        "POST",
        "/v1/messages",
        messages.create,
        "Answer a conversation, by Anthropic's API.",
        needs=Needs.ADMISSION,
        request=message_requests.MessagesRequest,
        answer=message_objects.MessageObject,
        event=message_objects.MessageEvent,
        errors=(404,),
        kept=stored_completions.is_kept,
    ),
    Route(
        "POST",
        "/v1/messages/count_tokens",
        messages.count_tokens,
        "Count the tokens of a conversation, by Anthropic's API.",
        needs=Needs.MODEL,
        request=message_requests.CountTokensRequest,
        answer=message_objects.TokenCount,
        errors=(404,),
    ),
    Route(
        "POST",
        "/v1/embeddings",
        pooling.embeddings,
        "A vector per prompt.",
        needs=Needs.ADMISSION,
        request=pooling_schemas.EmbeddingsRequest,
        answer=pooling_schemas.Embeddings,
        errors=(404,),
    ),
    Route(
        "POST",
        "/v1/score",
        pooling.score,
        "How likely texts are after other texts.",
        needs=Needs.ADMISSION,
        request=pooling_schemas.ScoreRequest,
        answer=pooling_schemas.Scores,
        errors=(404,),
    ),
    Route(
        "POST",
        "/v1/rerank",
        pooling.rerank,
        "Documents, the one after which the query is the likeliest first.",
        needs=Needs.ADMISSION,
        request=pooling_schemas.RerankRequest,
        answer=pooling_schemas.Ranking,
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
    Route(
        "GET",
        "/tokenizer_info",
        models.tokenizer_info,
        "The tokenizer's configuration, with its chat template.",
        needs=Needs.MODEL,
    ),
    Route("GET", "/load", probes.load, "How many requests run and wait.", answer=responses.Load),
    *(
        Route(
            method,
            "/ping",
            probes.ping,
            "The same as `/ready`, under SageMaker's name.",
            access=Access.OPEN,
            answer=responses.Liveness,
            verdict=True,
        )
        for method in ("GET", "POST")
    ),
    *(
        Route("GET", path, handler, summary, access=Access.OPEN, media_type="text/html")
        for path, handler, summary in (
            ("/", pages.home, "A page for people: what serves here."),
            ("/v1", pages.home, "The same page, at the address that clients take."),
            ("/docs", pages.docs, "A page for people: the routes."),
        )
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
        "POST",
        "/v1/load_lora_adapter",
        admin.load_adapter,
        "Load a LoRA adapter, and serve it as a model of that name.",
        access=Access.ADMIN,
        request=schemas.LoadAdapterRequest,
        answer=responses.AdapterList,
        errors=_CHANGE,
    ),
    Route(
        "POST",
        "/v1/unload_lora_adapter",
        admin.unload_adapter,
        "Serve a LoRA adapter no more.",
        access=Access.ADMIN,
        request=schemas.UnloadAdapterRequest,
        answer=responses.AdapterList,
        errors=(404, *_CHANGE),
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
KEPT_ROUTES: tuple[Route, ...] = tuple(route for route in API if route.kept is not None)
"""Routes of stored answers, as front ends have them answered by the process that keeps these."""
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
