"""``ullm serve``: the engine and its HTTP server as one tree, until a signal ends it."""

from __future__ import annotations

import signal
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import trio

from ullm.cli.terminal import announce, progress_bar, stderr
from ullm.config import EngineConfig, ServerConfig
from ullm.engine import Engine
from ullm.errors import StartCancelled
from ullm.hosting.engine_host import EngineHost, leave_soon
from ullm.hub import LocalModel, resolve
from ullm.logs import configure
from ullm.protocol import stop_budget
from ullm.server import (
    bind,
    file_remover,
    open_admin_socket,
    raise_limit,
    serve_admin,
    serve_http,
    tls_context,
    urls,
    warn_if_open,
)
from ullm.supervision import ChildSpec
from ullm.supervision.signals import remember_signals


def serve(config: EngineConfig, server: ServerConfig) -> int:
    """Listen, load and serve until a signal ends it; return the status, see docs/reference/exit-status.md.

    Raises:
        PortTaken: before anything is loaded.
        ConfigError: an address or a certificate that cannot be used; likewise.
        UllmError: the engine could not start, or failed.
    """
    early = remember_signals()
    raise_limit()
    configure(config.log_level)
    tls = tls_context(server.ssl_certfile, server.ssl_keyfile)
    with bind(server) as listener:
        warn_if_open(server, listener)
        run = partial(run_server, config, server, (listener, tls))
        if server.admin_listen is None:
            return trio.run(run, None, early)
        with open_admin_socket(server.admin_listen) as admin_listener:
            return trio.run(run, admin_listener, early)


async def run_server(
    config: EngineConfig,
    server: ServerConfig,
    endpoint: tuple[socket.socket, ssl.SSLContext | None],
    admin_listener: socket.socket | None,
    early: Sequence[signal.Signals],
) -> int:
    """Run the engine with the servers as its first children until a signal stops it; return the exit status.

    Args:
        endpoint: what listens for the API, and what encrypts its connections.
        early: signals that came before they could be answered.
    """
    listener, tls = endpoint

    async def http(*, task_status: trio.TaskStatus[list[str]]) -> None:
        await serve_http(
            engine, server, sockets=[listener], shutdown=host.request_stop, tls=tls, task_status=task_status
        )

    async def admin(*, task_status: trio.TaskStatus[list[str]]) -> None:
        assert admin_listener is not None, "only a listener has this child"
        await serve_admin(
            engine, server, sock=admin_listener, shutdown=host.request_stop, task_status=task_status
        )

    servers = [ChildSpec("http", http, shutdown=stop_budget.HTTP_SERVER)]
    if admin_listener is not None:
        servers.append(ChildSpec("admin", admin, shutdown=stop_budget.HTTP_SERVER))
    url = urls([listener], "http" if tls is None else "https")[0]
    engine = Engine(config, first_children=servers, find_model=find_model)
    host = EngineHost(engine)
    with host.watchdog:
        if admin_listener is not None:
            host.watchdog.cleanup = file_remover(admin_listener)
        async with trio.open_nursery() as nursery:
            await nursery.start(host.answer_signals)
            await nursery.start(host.answer_hangups)
            for number in early:
                signal.raise_signal(number)
            try:
                with suppress(StartCancelled):  # stopped before it had started; the report says how that went
                    await engine.run(task_status=Announcement(engine, url))
            finally:
                nursery.cancel_scope.cancel()
    assert engine.report is not None, "an engine that has stopped has a report"
    leave_soon(engine.report.exit_code)
    return engine.report.exit_code


class Announcement:
    """A task status for the engine, which announces on stdout that the server is ready."""

    def __init__(self, engine: Engine, url: str) -> None:
        self._engine = engine
        self._url = url
        self._began = trio.current_time()

    def started(self, value: object = None) -> None:
        """Print the address, the model and the duration of the start on one line."""
        seconds = trio.current_time() - self._began
        announce(f"ready: {self._url}/v1 model {self._engine.model_name} in {seconds:.1f} s\n")


def find_model(config: EngineConfig) -> LocalModel:
    """Run `resolve` with progress on stderr, in a thread; it ends soon after the engine was stopped."""
    with progress_bar(stderr()) as show:

        def report(label: str, done: int, total: int | None) -> None:
            trio.from_thread.check_cancelled()
            show(label, done, total)

        return resolve(config, report)
