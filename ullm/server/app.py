"""The app factory: everything that ullm says over HTTP, around one engine."""

from __future__ import annotations

import hmac
import re
import uuid

from quart import Response, g, request
from quart_trio import QuartTrio

from ullm.config import ServerConfig
from ullm.server import chat, completions, errors, models, openapi, probes
from ullm.server.connection import BoundedRequest, Connection
from ullm.server.metrics import Metrics
from ullm.server.types import Engine

BODY_TIMEOUT = 60
"""Seconds for a request's body to arrive."""
_OPEN = frozenset({"/live", "/ready", "/health", "/version", "/metrics", "/openapi.json"})
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def create_app(engine: Engine, server_config: ServerConfig) -> QuartTrio:
    """Build the ASGI app, for a trio server.

    Args:
        engine: in any state; until it is ready, requests to generate get 503.
    """
    app = QuartTrio(__name__, static_folder=None)
    app.asgi_http_class = Connection
    app.request_class = BoundedRequest
    app.url_map.merge_slashes = False  # a redirect would be an answer that nobody documented
    app.config.update(
        MAX_CONTENT_LENGTH=server_config.max_body,
        BODY_TIMEOUT=BODY_TIMEOUT,
        RESPONSE_TIMEOUT=None,  # Quart would cut longer streams off without a word
        PROVIDE_AUTOMATIC_OPTIONS=False,
    )
    metrics = Metrics(engine)
    app.extensions["ullm_count"] = metrics.count_response
    errors.install(app, server_config.max_body)
    _install_request_ids(app)
    _install_cors(app, server_config.cors_origins)
    if server_config.api_key is not None:
        _install_api_key(app, server_config.api_key)
    probes.install(app, engine, metrics)
    models.install(app, engine)
    completions.install(app, engine, metrics)
    chat.install(app, engine, metrics)
    openapi.install(app, secured=server_config.api_key is not None)
    return app


def _install_request_ids(app: QuartTrio) -> None:
    """Take the client's ``X-Request-Id``, or make one, and send it back."""

    async def receive() -> None:
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    async def send(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        return response

    app.before_request(receive)
    app.after_request(send)


def _install_api_key(app: QuartTrio, api_key: str) -> None:
    """Ask for the key everywhere but at the probes; the comparison takes the same time for any key."""
    expected = f"Bearer {api_key}".encode()

    async def check() -> None:
        given = request.headers.get("Authorization", "").encode("latin-1")  # the bytes that were sent
        if request.path not in _OPEN and not hmac.compare_digest(given, expected):
            raise errors.Unauthorized("the API key is missing or wrong; send 'Authorization: Bearer <key>'")

    app.before_request(check)


def _install_cors(app: QuartTrio, origins: tuple[str, ...]) -> None:
    """Let pages of these origins call the API (Fetch standard, CORS protocol); ``*`` is any."""

    def allowed() -> str | None:
        origin: str | None = request.headers.get("Origin")
        return origin if origin is not None and ("*" in origins or origin in origins) else None

    async def preflight() -> Response | None:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        if allowed() is None:
            return None
        return Response(
            b"",
            status=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
                "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "*"),
                "Access-Control-Max-Age": "600",
            },
        )

    async def grant(response: Response) -> Response:
        origin = allowed()
        if origin is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id"
            response.headers["Vary"] = "Origin"
        return response

    if origins:
        app.before_request(preflight)
        app.after_request(grant)
