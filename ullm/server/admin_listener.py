"""The admin listener: the admin endpoints without a key, out of reach of other machines.

It listens on a unix socket, which only the user who runs the server may open, or on a loopback port.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from ullm.config import ServerConfig
from ullm.errors import ConfigError, ResourceUnavailable
from ullm.server.api.types import EngineInterface
from ullm.server.app import create_admin_app
from ullm.server.routes.service import Shutdown
from ullm.server.serve import serve_app
from ullm.server.sockets import claim, unix_socket

UNIX = "unix:"
_MODE = 0o600
MAX_CONNECTIONS = 16
"""Connections at a time; they come out of the reserve that the other server leaves."""


async def serve_admin(
    engine: EngineInterface,
    server_config: ServerConfig,
    *,
    sock: socket.socket,
    shutdown: Shutdown | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the admin endpoints and the probes until cancelled. Runs as a supervised child.

    Args:
        sock: from `open_admin_socket`.
        shutdown: see `ullm.server.app.create_app`.
        task_status: gets the URL.
    """
    app = create_admin_app(engine, server_config, shutdown=shutdown)
    await serve_app(
        app, server_config, sockets=[sock], max_connections=MAX_CONNECTIONS, task_status=task_status
    )


@contextmanager
def open_admin_socket(where: str) -> Iterator[socket.socket]:
    """Listen on ``unix:PATH`` or ``HOST:PORT`` within this block; then close the socket, remove its file.

    Raises:
        ConfigError: the address does not exist, is in use, or can be reached by other machines.
    """
    if where.startswith(UNIX):
        with unix_socket(f"--admin-listen {where}", where.removeprefix(UNIX), _MODE) as sock:
            yield sock
    else:
        with _loopback_socket(where) as sock:
            yield sock


def _loopback_socket(where: str) -> socket.socket:
    host, colon, port = where.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--admin-listen {where}: expected unix:PATH or 127.0.0.1:PORT")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ResourceUnavailable(f"--admin-listen {where}: {error.strerror or error}") from None
    if not ipaddress.ip_address(address[0]).is_loopback:
        raise ConfigError(
            f"--admin-listen {where}: other machines could reach {host}, and this listener requires no key; "
            "use unix:PATH or 127.0.0.1:PORT, or --admin-key to open the endpoints on the server's own port"
        )
    sock = socket.socket(family, kind, protocol)
    try:
        claim(sock, address)
    except OSError as error:
        sock.close()
        raise ResourceUnavailable(f"--admin-listen {where}: {error.strerror or error}") from None
    return sock
