"""Listening and serving: the socket before the model is loaded, Hypercorn as a supervised child."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Sequence

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from ullm.actors.base import cleanup_scope
from ullm.config import ServerConfig
from ullm.errors import ConfigError, PortTaken
from ullm.server.app import create_app
from ullm.server.types import Engine

BACKLOG = 2048
KEEP_ALIVE = 75.0
"""Seconds that an idle connection stays open; longer than the usual load balancer's 60."""
FLUSH = 5.0
"""Seconds for running handlers to finish when nobody has set a stop deadline."""


def bind(server_config: ServerConfig) -> socket.socket:
    """Take the address and listen, so that a taken port is known before the model loads.

    Connections wait in the backlog until `serve_http` runs.

    Raises:
        PortTaken: something else listens there.
        ConfigError: the address is not this machine's.
    """
    host, port = server_config.host, server_config.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}") from None
    sock = socket.socket(family, kind, protocol)
    try:
        _claim(sock, address)
    except OSError as error:
        sock.close()
        raise _bind_error(error, host, port) from None
    return sock


def _claim(sock: socket.socket, address: tuple[object, ...]) -> None:
    if sys.platform == "win32":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    sock.bind(address)
    sock.listen(BACKLOG)


def _bind_error(error: OSError, host: str, port: int) -> Exception:
    import errno

    if error.errno in (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", errno.EADDRINUSE)):
        return PortTaken(host, port)
    return ConfigError(f"cannot listen on --host {host} --port {port}: {error.strerror or error}")


def urls(sockets: Sequence[socket.socket]) -> list[str]:
    """Where the sockets can be reached; with ``--port 0`` this has the real port."""
    found = []
    for sock in sockets:
        host, port = sock.getsockname()[:2]
        found.append(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    return found


def hypercorn_config(sockets: Sequence[socket.socket]) -> Config:
    """Hypercorn's settings: duplicates of the sockets; no access log; no time limits of its own."""
    config = Config()
    config.bind = [f"fd://{sock.dup().detach()}" for sock in sockets]
    config.backlog = BACKLOG
    config.accesslog = None
    config.errorlog = None
    config.keep_alive_timeout = KEEP_ALIVE
    config.keep_alive_max_requests = sys.maxsize
    config.graceful_timeout = math.inf  # `serve_http` sets the limit
    config.startup_timeout = math.inf
    config.shutdown_timeout = math.inf
    config.include_server_header = False
    return config


async def serve_http(
    engine: Engine,
    server_config: ServerConfig,
    *,
    sockets: Sequence[socket.socket],
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; started with the URLs. A supervised child.

    When it is cancelled it stops accepting, gives the handlers that run until its stop deadline to
    finish, and then closes their connections. The engine is drained before that, while this still serves.

    Args:
        sockets: from `bind`. A stop closes them; a failure does not, so that a supervisor can restart this.
    """
    stop, ended = trio.Event(), trio.Event()
    scope = trio.CancelScope(shield=True)
    app = create_app(engine, server_config)

    async def run(*, task_status: trio.TaskStatus[list[str]]) -> None:
        try:
            with scope:
                await serve(
                    app, hypercorn_config(sockets), shutdown_trigger=stop.wait, task_status=task_status
                )
        finally:
            ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        task_status.started(urls(sockets))
        try:
            await trio.sleep_forever()
        finally:
            if not ended.is_set():
                await _finish(sockets, stop, ended)
                scope.cancel()


async def _finish(sockets: Sequence[socket.socket], stop: trio.Event, ended: trio.Event) -> None:
    """Stop accepting, and let the handlers finish until the stop deadline."""
    for sock in sockets:
        sock.close()  # Hypercorn closes its duplicate; the port listens until both are
    stop.set()
    with cleanup_scope(FLUSH):
        await ended.wait()
