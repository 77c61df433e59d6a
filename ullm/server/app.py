"""The app factories: everything that ullm says over HTTP, around one engine."""

from __future__ import annotations

from functools import partial

from quart import Response, request
from quart_trio import QuartTrio

from ullm.config import ServerConfig
from ullm.server import access, access_log, web_pages
from ullm.server.api import errors
from ullm.server.api.limits import body_limit
from ullm.server.api.route import Access, Route
from ullm.server.api.types import EngineInterface
from ullm.server.http.faulty import FaultyHttp
from ullm.server.http.quart_connection import BoundedRequest, QuartConnection
from ullm.server.metrics import Metrics
from ullm.server.routes import dispatch
from ullm.server.routes.service import Service, Shutdown
from ullm.server.routes.stored_answers import serve_answers
from ullm.server.routes.table import ADMIN_ROUTES, KEPT_ROUTES, ROUTES, access_of
from ullm.server.stored.answers import Answers

BODY_TIMEOUT = 60
"""Seconds for a request's body to arrive."""


def create_app(
    engine: EngineInterface,
    server_config: ServerConfig,
    *,
    shutdown: Shutdown | None = None,
    local: bool | None = None,
    answers: Answers | None = None,
) -> QuartTrio:
    """Build the ASGI app, for a trio server.

    With ``--answers-listen`` it is for front ends, which forward what concerns stored answers.

    Args:
        engine: in any state; until it is ready, requests to generate get 503.
        shutdown: carries out ``POST /admin/shutdown``; default: the engine's own `request_shutdown`.
        local: only this machine reaches the server; None: to be told from each request.
        answers: the stored ones, which outlive this app if it is built again; default: new ones.

    Raises:
        ConfigError: the journal that the configuration names cannot be used.
    """
    app = _bare_app(engine, server_config)
    answers = answers or Answers(engine, server_config)
    if server_config.answers_listen is not None:
        access.install_trust(app)
        routes = KEPT_ROUTES
    else:
        web_pages.install_strangers(app, server_config, local=local)
        web_pages.install_cors(app, server_config.cors_origins)
        access.install_keys(app, server_config)
        routes = ROUTES
    service = _service(routes, engine, server_config, shutdown, answers)
    serve_answers(service)
    if engine.http_faults is not None:
        faulty = FaultyHttp(app.asgi_app, engine.http_faults, lambda path: access_of(path) is Access.KEY)
        app.asgi_app = faulty  # type: ignore[method-assign]  # as Flask and Quart have middleware put in place
    return _with_routes(app, service)


def create_admin_app(
    engine: EngineInterface, server_config: ServerConfig, *, shutdown: Shutdown | None = None
) -> QuartTrio:
    """Build the ASGI app of the admin listener: admin endpoints without a key, and the probes.

    Args:
        shutdown: as in `create_app`.
    """
    app = _bare_app(engine, server_config)
    unix = (server_config.admin_listen or "").startswith("unix:")
    web_pages.install_local_only(app, by_name=not unix)
    return _with_routes(app, _service(ADMIN_ROUTES, engine, server_config, shutdown, None))


def _bare_app(engine: EngineInterface, server_config: ServerConfig) -> QuartTrio:
    def limit() -> int:
        return body_limit(server_config, engine.info)

    app = QuartTrio(__name__, static_folder=None)
    app.asgi_http_class = QuartConnection
    app.request_class = BoundedRequest
    app.url_map.merge_slashes = False  # a redirect would be an answer that nobody documented
    app.config.update(
        BODY_LIMIT=limit,
        BODY_TIMEOUT=BODY_TIMEOUT,
        RESPONSE_TIMEOUT=None,  # Quart would cut longer streams off without a word
        PROVIDE_AUTOMATIC_OPTIONS=False,
    )
    errors.install(app, limit)
    access.install_common_headers(app)
    if server_config.access_log:
        access_log.install(app)
    return app


def _service(
    routes: tuple[Route, ...],
    engine: EngineInterface,
    server_config: ServerConfig,
    shutdown: Shutdown | None,
    answers: Answers | None,
) -> Service:
    stop = shutdown or partial(engine.request_shutdown, by="admin")
    return Service(engine, server_config, Metrics(engine), routes, stop, answers)


def _with_routes(app: QuartTrio, service: Service) -> QuartTrio:
    metrics = service.metrics
    dispatch.install(app, service)

    async def count(response: Response) -> Response:
        """Count a response that is about to be sent, or a stream that has ended."""
        rule = request.url_rule
        method = "other" if rule is None else request.method
        metrics.count_response(method, "other" if rule is None else rule.rule, response.status_code)
        return response

    app.after_request(count)
    return app
