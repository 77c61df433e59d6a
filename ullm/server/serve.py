"""Listening before the model is loaded, and serving as a supervised child."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trio

from ullm.config import ServerConfig
from ullm.errors import ConfigError, PortTaken
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.server.api.types import EngineInterface
from ullm.server.app import create_app
from ullm.server.http.descriptors import connection_limit
from ullm.server.http.listener import Listener
from ullm.server.http.tls import tls_context
from ullm.server.routes.service import Shutdown
from ullm.supervision.actor import current_lifetime

log = get_logger(__name__)

BACKLOG = 2048
"""Connections that the kernel holds until they are accepted."""


def bind(server_config: ServerConfig) -> socket.socket:
    """Bind the address and listen, so that a port in use is reported before the model loads.

    Connections wait in the backlog until `serve_http` runs.

    Raises:
        PortTaken: another program listens there.
        ConfigError: the address does not belong to this machine.
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
        claim(sock, address)
    except OSError as error:
        sock.close()
        raise _bind_error(error, host, port) from None
    return sock


def claim(sock: socket.socket, address: tuple[Any, ...]) -> None:
    """Bind a TCP socket exclusively and listen.

    Raises:
        OSError: the address is in use, or does not belong to this machine.
    """
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


def urls(sockets: Sequence[socket.socket], scheme: str = "http") -> list[str]:
    """Return the URLs of the sockets, with the real port where ``--port 0`` was given."""
    addresses = []
    for sock in sockets:
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            addresses.append(f"unix:{sock.getsockname()}")
            continue
        host, port = sock.getsockname()[:2]
        addresses.append(f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}")
    return addresses


def warn_if_open(server_config: ServerConfig, sock: socket.socket) -> None:
    """Warn once if other machines can reach the API and no key is asked for."""
    host = sock.getsockname()[0]
    if not server_config.api_keys and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        log.warning(
            "other machines can reach the API, and no key is asked for; use --api-key-file, or --host "
            "127.0.0.1 behind a proxy",
            host=host,
        )


async def serve_http(
    engine: EngineInterface,
    server_config: ServerConfig,
    *,
    sockets: Sequence[socket.socket],
    shutdown: Shutdown | None = None,
    tls: ssl.SSLContext | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the whole API until cancelled; see `serve_app`. Runs as a supervised child.

    Args:
        shutdown: see `ullm.server.app.create_app`.
        tls: made from the configured files before; default: they are read now.
        task_status: gets the URLs.
    """
    app = create_app(engine, server_config, shutdown=shutdown)
    tls = tls or tls_context(server_config.ssl_certfile, server_config.ssl_keyfile)
    await serve_app(app, server_config, sockets=sockets, tls=tls, task_status=task_status)


async def serve_app(
    app: Any,
    server_config: ServerConfig,
    *,
    sockets: Sequence[socket.socket],
    max_connections: int | None = None,
    tls: ssl.SSLContext | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an app until cancelled.

    When cancelled, it stops accepting, lets the running handlers finish until shortly before its stop
    deadline, and then cuts their connections. The engine is drained before that, while this still serves,
    so that only answers to clients that do not read are left by then.

    Args:
        sockets: from `bind`. A stop closes them; a failure does not, so that a supervisor can restart this.
        max_connections: connections at a time; default: what the limit of descriptors allows.
        tls: what to encrypt connections with; None: nothing.
        task_status: gets the URLs.
    """
    limit = connection_limit() if max_connections is None else max_connections
    listener = Listener(app, stall_timeout=server_config.stall_timeout, max_connections=limit, tls=tls)
    ended = trio.Event()
    scope = trio.CancelScope(shield=True)

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        try:
            with scope:
                await listener.serve(sockets, task_status=task_status)
        finally:
            ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        task_status.started(urls(sockets, "http" if tls is None else "https"))
        try:
            await trio.sleep_forever()
        finally:
            if not ended.is_set():
                await _finish(sockets, listener, ended)
                scope.cancel()


async def _finish(sockets: Sequence[socket.socket], listener: Listener, ended: trio.Event) -> None:
    """Stop accepting, let the handlers finish, and cut those that do not finish in time."""
    for sock in sockets:
        sock.close()  # the listener closes its duplicate; the port listens until both are
    listener.stop()
    with _until_shortly_before_the_stop_deadline():
        await ended.wait()
    listener.cut()


@contextmanager
def _until_shortly_before_the_stop_deadline() -> Iterator[None]:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + stop_budget.HANDLER_FLUSH) as scope:
        lifetime = current_lifetime()
        if lifetime is None:
            yield
            return

        def follow(deadline: float) -> None:
            scope.deadline = min(scope.deadline, deadline - stop_budget.CONNECTION_CUT_RESERVE)

        with lifetime.followed_by(follow):
            yield
