"""The access log: one line per request, once its answer has ended or its client has left.

A line has no text of a request or an answer, and no query string, which may hold keys.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass, field
from typing import Any

import trio
from quart import g, has_request_context, request
from quart_trio import QuartTrio

from ullm.logs import get_logger
from ullm.server.routes.outputs import Outputs

log = get_logger(__name__)

_KEY = "ullm.access"
"""Where a request's scope has its record."""
_LONGEST_PATH = 200
"""Characters of a path that are logged."""


@dataclass
class Record:
    """What is known of a request while it is answered."""

    request_id: str = ""
    status: int | None = None
    ended: bool = False
    outputs: list[Outputs] = field(default_factory=list)


def install(app: QuartTrio) -> None:
    """Log a line per request of ``app``, whose requests have their names by then."""
    serve: Any = app.asgi_app

    async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await serve(scope, receive, send)
            return
        record = scope[_KEY] = Record()
        began = trio.current_time()

        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)
            record.ended |= message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await serve(scope, receive, noted)
        finally:
            _write(scope, record, trio.current_time() - began)

    async def name() -> None:
        scope: Any = request.scope
        scope[_KEY].request_id = g.request_id

    app.asgi_app = asgi_app  # type: ignore[method-assign]  # as Quart's documentation has it for middleware
    app.before_request(name)


def note_outputs(outputs: Outputs) -> None:
    """Have the line of the current request, if there will be one, count these outputs' tokens."""
    scope: Any = request.scope if has_request_context() else {}
    if _KEY in scope:
        scope[_KEY].outputs.append(outputs)


def _write(scope: Any, record: Record, seconds: float) -> None:
    tokens: dict[str, object] = {}
    if record.outputs:
        usages = [each.usage() for each in record.outputs]
        tokens["prompt_tokens"] = sum(usage.prompt_tokens for usage in usages)
        tokens["completion_tokens"] = sum(usage.completion_tokens for usage in usages)
    log.info(
        "request",
        request_id=record.request_id or "-",
        method=scope["method"],
        path=urllib.parse.quote(scope["path"])[:_LONGEST_PATH],
        status=record.status or "-",
        **tokens,
        seconds=round(seconds, 3),
        **({} if record.ended else {"client": "left before the end"}),
    )
