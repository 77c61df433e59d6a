"""From the table of routes to the app: decode the request, call the handler."""

from __future__ import annotations

from typing import Any

import trio
from quart import Response
from quart_trio import QuartTrio
from werkzeug.routing import PathConverter

from ullm.server.api import limits, requests
from ullm.server.api.errors import as_request_error
from ullm.server.api.route import Access, Handler, Needs, Route
from ullm.server.api.types import EngineInterface
from ullm.server.routes.forwarding import forward
from ullm.server.routes.service import Service


class RestOfPath(PathConverter):
    """Takes the rest of a path, which may begin with a slash, as a folder's name does."""

    regex = ".+?"
    part_isolating = False


def install(app: QuartTrio, service: Service) -> None:
    """Add the service's routes to ``app``."""
    app.url_map.converters["path"] = RestOfPath
    for route in service.routes:
        rule = route.path.replace("{", "<path:").replace("}", ">")
        endpoint = f"{route.method} {route.path}".replace(".", "_")  # a dot would name a blueprint
        app.add_url_rule(rule, endpoint, _view(route, service), methods=[route.method])


def _view(route: Route, service: Service) -> Handler:
    read = None
    if route.request is not None:
        read = requests.json_reader(
            route.request,
            service.config,
            service.unknown_fields,
            service.large_bodies.parse,
            optional=route.optional,
        )

    kept = route.kept if service.config.answers is not None else None

    async def view(**parameters: str) -> Response:
        arguments: list[Any] = [service]
        body = None
        _check_needs(route.needs, service.engine)
        if route.access is Access.ADMIN:
            requests.check_query(route.fields if route.in_query else ())
        if read is not None:
            body = await read()
            limits.check_request(body, service.config, service.engine.info)
            arguments.append(requests.with_query(body) if route.in_query else body)
        try:
            if kept is not None and kept(service.config, body):
                return await forward(service)
            return await route.handler(*arguments, **parameters)
        except BaseExceptionGroup as error:
            if error.subgroup(trio.Cancelled) is not None:
                raise
            raise as_request_error(error) from error

    return view


def _check_needs(needs: Needs, engine: EngineInterface) -> None:
    """Refuse a request that the engine would not take, before its body is read and tokenized."""
    if needs is Needs.ADMISSION:
        engine.check_admission()
    elif needs is Needs.MODEL:
        requests.loaded(engine)
