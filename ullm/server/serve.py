"""Serving as a supervised child, on sockets that listen already."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import trio

from ullm.config import ServerConfig
from ullm.protocol import stop_budget
from ullm.server.api.types import EngineInterface
from ullm.server.app import create_app
from ullm.server.http.descriptors import connection_limit
from ullm.server.http.listener import Listener
from ullm.server.http.tls import tls_context
from ullm.server.routes.service import Shutdown
from ullm.server.sockets import is_local, urls
from ullm.server.stored.answers import Answers
from ullm.supervision.actor import current_lifetime


async def serve_http(
    engine: EngineInterface,
    server_config: ServerConfig,
    *,
    sockets: Sequence[socket.socket],
    shutdown: Shutdown | None = None,
    tls: ssl.SSLContext | None = None,
    shared: bool = False,
    answers: Answers | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the whole API until cancelled; see `serve_app`. Runs as a supervised child.

    Args:
        shutdown: see `ullm.server.app.create_app`.
        tls: made from the configured files before; default: they are read now.
        shared: see `serve_app`.
        answers: see `ullm.server.app.create_app`; a restart of the child needs the same ones.
        task_status: gets the URLs.
    """
    local = all(is_local(sock) for sock in sockets)
    app = create_app(engine, server_config, shutdown=shutdown, local=local, answers=answers)
    http2 = server_config.http2
    tls = tls or tls_context(server_config.ssl_certfile, server_config.ssl_keyfile, http2=http2)
    serve = partial(serve_app, app, server_config, sockets=sockets, tls=tls, http2=http2, shared=shared)
    await serve(task_status=task_status)


async def serve_app(
    app: Any,
    server_config: ServerConfig,
    *,
    sockets: Sequence[socket.socket],
    max_connections: int | None = None,
    tls: ssl.SSLContext | None = None,
    http2: bool = False,
    shared: bool = False,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an app until cancelled.

    When cancelled, it stops accepting, lets the running handlers finish until shortly before its stop
    deadline, and then cuts their connections. The engine is drained before that, while this still serves,
    so that only answers to clients that do not read are left by then.

    Args:
        sockets: from `open_sockets`. A stop closes them; a failure does not, so that a supervisor can
            restart this.
        max_connections: connections at a time; default: what the limit of descriptors allows.
        tls: what to encrypt connections with; None: nothing.
        http2: whether clients may speak HTTP/2, too.
        shared: another process listens on the sockets, too, and goes on when this stops.
        task_status: gets the URLs.
    """
    limit = connection_limit() if max_connections is None else max_connections
    listener = Listener(
        app,
        stall_timeout=server_config.stall_timeout,
        max_connections=limit,
        tls=tls,
        http2=http2,
        same_user=server_config.answers_listen is not None,
    )
    ended = trio.Event()
    scope = trio.CancelScope(shield=True)

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        try:
            with scope:
                await listener.serve(sockets, shared=shared, task_status=task_status)
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
