"""The HTTP surface: OpenAI's API, probes, metrics and admin endpoints around an engine.

`http` serves connections, `api` holds the values of the API, `routes` the handlers and their table.
Imports the engine, supervision and what is below them.
"""

from ullm.server.admin_listener import open_admin_socket, serve_admin
from ullm.server.app import create_admin_app, create_app
from ullm.server.http.descriptors import raise_limit
from ullm.server.http.tls import tls_context
from ullm.server.serve import serve_http
from ullm.server.sockets import (
    bind,
    claim,
    file_remover,
    inherited_socket,
    inherited_sockets,
    open_sockets,
    unix_socket,
    urls,
    warn_if_open,
)
from ullm.server.stored.answers import Answers

__all__ = [
    "Answers",
    "bind",
    "claim",
    "create_admin_app",
    "create_app",
    "file_remover",
    "inherited_socket",
    "inherited_sockets",
    "open_admin_socket",
    "open_sockets",
    "raise_limit",
    "serve_admin",
    "serve_http",
    "tls_context",
    "unix_socket",
    "urls",
    "warn_if_open",
]
