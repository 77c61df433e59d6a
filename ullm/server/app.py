"""The app factories: everything that ullm says over HTTP, around one engine."""

from __future__ import annotations

from functools import partial

from quart import Response, request
from quart_trio import QuartTrio

from ullm.config import ServerConfig
from ullm.server import access
from ullm.server.api import errors
from ullm.server.api.route import Route
from ullm.server.api.types import EngineInterface
from ullm.server.http.quart_connection import BoundedRequest, QuartConnection
from ullm.server.metrics import Metrics
from ullm.server.routes import dispatch
from ullm.server.routes.service import Service, Shutdown
from ullm.server.routes.table import ADMIN_ROUTES, ROUTES

BODY_TIMEOUT = 60
"""Seconds for a request's body to arrive."""


def create_app(
    engine: EngineInterface, server_config: ServerConfig, *, shutdown: Shutdown | None = None
) -> QuartTrio:
    """Build the ASGI app, for a trio server.

    Args:
        engine: in any state; until it is ready, requests to generate get 503.
        shutdown: carries out ``POST /admin/shutdown``; default: the engine's own `request_shutdown`.
    """
    app = _bare_app(server_config)
    access.install_cors(app, server_config.cors_origins)
    access.install_keys(app, server_config)
    return _with_routes(app, ROUTES, engine, server_config, shutdown)


def create_admin_app(
    engine: EngineInterface, server_config: ServerConfig, *, shutdown: Shutdown | None = None
) -> QuartTrio:
    """Build the ASGI app of the admin listener: admin endpoints without a key, and the probes.

    Args:
        shutdown: as in `create_app`.
    """
    app = _bare_app(server_config)
    unix = (server_config.admin_listen or "").startswith("unix:")
    access.install_local_only(app, by_name=not unix)
    return _with_routes(app, ADMIN_ROUTES, engine, server_config, shutdown)


def _bare_app(server_config: ServerConfig) -> QuartTrio:
    app = QuartTrio(__name__, static_folder=None)
    app.asgi_http_class = QuartConnection
    app.request_class = BoundedRequest
    app.url_map.merge_slashes = False  # a redirect would be an answer that nobody documented
    app.config.update(
        MAX_CONTENT_LENGTH=server_config.max_body,
        BODY_TIMEOUT=BODY_TIMEOUT,
        RESPONSE_TIMEOUT=None,  # Quart would cut longer streams off without a word
        PROVIDE_AUTOMATIC_OPTIONS=False,
    )
    errors.install(app, server_config.max_body)
    access.install_common_headers(app)
    return app


def _with_routes(
    app: QuartTrio,
    routes: tuple[Route, ...],
    engine: EngineInterface,
    server_config: ServerConfig,
    shutdown: Shutdown | None,
) -> QuartTrio:
    metrics = Metrics(engine)
    stop = shutdown or partial(engine.request_shutdown, by="admin")
    dispatch.install(app, Service(engine, server_config, metrics, routes, stop))

    async def count(response: Response) -> Response:
        """Count a response that is about to be sent, or a stream that has ended."""
        rule = request.url_rule
        method = "other" if rule is None else request.method
        metrics.count_response(method, "other" if rule is None else rule.rule, response.status_code)
        return response

    app.after_request(count)
    return app
