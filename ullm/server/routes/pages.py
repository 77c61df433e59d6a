"""``GET /``, ``/v1`` and ``/docs``: pages for people who open the server's address in a browser."""

from __future__ import annotations

from html import escape

from quart import Response

import ullm
from ullm.server.routes.service import Service

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}td{padding:.1em 1em .1em 0}"
)


async def home(service: Service) -> Response:
    """Say what serves here, and where to go on."""
    name = escape(service.engine.model_name)  # not the others: one may be a path on this machine
    state = escape(service.engine.health().state)
    return _page(
        f"ullm {escape(ullm.__version__)}",
        f"<p>This is a server of OpenAI's API; its state is <b>{state}</b>. It serves "
        f"<code>{name}</code>. Clients take this address with <code>/v1</code> as their base "
        "URL.</p>"
        '<p><a href="/docs">Routes</a> · <a href="/openapi.json">OpenAPI</a> · '
        '<a href="/health">Health</a> · <a href="/metrics">Metrics</a></p>',
    )


async def docs(service: Service) -> Response:
    """List the routes."""
    rows = "".join(
        f"<tr><td>{route.method}</td><td><code>{escape(route.path)}</code></td>"
        f"<td>{escape(route.access.value)}</td><td>{escape(route.summary)}</td></tr>"
        for route in service.routes
    )
    return _page("Routes", f'<table>{rows}</table><p><a href="/openapi.json">OpenAPI</a></p>')


def _page(title: str, body: str) -> Response:
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>{body}</html>"
    )
    headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return Response(text, content_type="text/html; charset=utf-8", headers=headers)
