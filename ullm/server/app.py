"""The app factories: everything that ullm says over HTTP, around one engine."""

from __future__ import annotations

from collections.abc import Callable

from quart_trio import QuartTrio

from ullm.config import ServerConfig
from ullm.server import access
from ullm.server.api import errors, openapi
from ullm.server.api.types import Engine
from ullm.server.http.connection import BoundedRequest, Connection
from ullm.server.http.pacing import Pacer
from ullm.server.metrics import Metrics
from ullm.server.routes import admin, backend, chat, completions, inference, models, probes

BODY_TIMEOUT = 60
"""Seconds for a request's body to arrive."""
Shutdown = Callable[[float | None], object]
"""Begins the stop of the engine, given the seconds until all is gone."""


def create_app(engine: Engine, server_config: ServerConfig, *, shutdown: Shutdown | None = None) -> QuartTrio:
    """Build the ASGI app, for a trio server.

    Args:
        engine: in any state; until it is ready, requests to generate get 503.
        shutdown: what ``POST /admin/shutdown`` does; default: the engine's own `request_shutdown`.
    """
    app = _bare_app(server_config)
    metrics = _metrics(app, engine)
    access.install_cors(app, server_config.cors_origins)
    access.install_keys(app, server_config)
    probes.install(app, engine, metrics)
    models.install(app, engine)
    backend.install(app, engine)
    pacer = Pacer()
    completions.install(app, engine, metrics, pacer, server_config.sse_keep_alive)
    chat.install(app, engine, metrics, pacer, server_config.sse_keep_alive)
    inference.install(app, engine, metrics)
    admin.install(app, engine, shutdown)
    openapi.install(app, secured=server_config.api_key is not None)
    return app


def create_admin_app(
    engine: Engine, server_config: ServerConfig, *, shutdown: Shutdown | None = None
) -> QuartTrio:
    """Build the ASGI app of the admin listener: admin endpoints without a key, and the probes.

    Args:
        shutdown: as `create_app` has it.
    """
    app = _bare_app(server_config)
    unix = (server_config.admin_listen or "").startswith("unix:")
    access.install_local_only(app, by_name=not unix)
    probes.install(app, engine, _metrics(app, engine))
    admin.install(app, engine, shutdown)
    return app


def _bare_app(server_config: ServerConfig) -> QuartTrio:
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
    errors.install(app, server_config.max_body)
    access.install_request_ids(app)
    return app


def _metrics(app: QuartTrio, engine: Engine) -> Metrics:
    metrics = Metrics(engine)
    app.extensions["ullm_count"] = metrics.count_response
    return metrics
