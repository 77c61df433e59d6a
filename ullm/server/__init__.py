"""The HTTP surface: OpenAI's API, probes, metrics and admin endpoints around an engine.

`http` serves connections, `api` holds the values of the API, `routes` the handlers and their table.
Imports the engine, supervision and what is below them.
"""

from ullm.server.admin_listener import file_remover, open_admin_socket, serve_admin
from ullm.server.app import create_admin_app, create_app
from ullm.server.http.descriptors import raise_limit
from ullm.server.http.tls import tls_context
from ullm.server.serve import bind, serve_http, urls, warn_if_open

__all__ = [
    "bind",
    "create_admin_app",
    "create_app",
    "file_remover",
    "open_admin_socket",
    "raise_limit",
    "serve_admin",
    "serve_http",
    "tls_context",
    "urls",
    "warn_if_open",
]
