"""``ullm serve``: the engine and its HTTP server as one tree, or one of the two, until a signal ends it."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import trio

from ullm.cli.systemd import ServiceManager
from ullm.cli.terminal import announce, progress_bar, stderr
from ullm.config import EngineConfig, ServerConfig
from ullm.engine import Engine
from ullm.errors import StartCancelled
from ullm.hosting.engine_host import EngineHost, HostedEngine, leave_soon
from ullm.hosting.front_end_listener import open_front_end_socket, shown
from ullm.hosting.front_ends import check_link_tls, note_engine_variables
from ullm.hub import LocalModel, resolve
from ullm.link import Gate, RemoteEngine, engine_key
from ullm.logs import configure
from ullm.protocol import start_budget, stop_budget
from ullm.server import (
    Answers,
    file_remover,
    inherited_sockets,
    open_admin_socket,
    open_sockets,
    raise_limit,
    serve_admin,
    serve_http,
    tls_context,
    urls,
    warn_if_open,
)
from ullm.supervision import ChildSpec
from ullm.supervision.signals import remember_signals
from ullm.supervision.spec import ChildFunction
from ullm.tls.link_tls import link_tls

FRONT_END_PATIENCE = 2.0
"""Seconds that a front end waits for its engine before it accepts connections, which it would have to refuse:
one that is started again shares its port with others that serve."""

Companion = Callable[[EngineHost], Awaitable[None]]
"""Runs beside a server, and may request its stop."""


def serve(config: EngineConfig, server: ServerConfig) -> int:
    """Listen, load and serve until a signal ends it; return the status, see docs/reference/exit-status.md.

    Raises:
        PortTaken: before anything is loaded.
        ConfigError: an address or a certificate that cannot be used; likewise.
        UllmError: the engine could not start, or failed.
    """
    if server.connect is not None:
        configure(config.log_level, as_json=config.log_format == "json")
        note_engine_variables(config)
    check_link_tls(config, server)
    if server.api_server_count > 1:
        from ullm.cli.launcher import launch

        return launch(config, server)
    return run_process(config, server, inherited_sockets(os.environ))


def run_process(
    config: EngineConfig,
    server: ServerConfig,
    inherited: Sequence[socket.socket] = (),
    companion: Companion | None = None,
) -> int:
    """Serve in this process; see `serve`.

    Args:
        inherited: sockets that listen already, and go on when this process stops.
    """
    early = remember_signals()
    raise_limit()
    configure(config.log_level, as_json=config.log_format == "json")
    tls = tls_context(server.ssl_certfile, server.ssl_keyfile, http2=server.http2)
    manager = ServiceManager.from_environment(os.environ)
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        if server.answers_listen is not None and not inherited:
            place = open_front_end_socket(server.answers_listen, option="--answers-listen")
            sockets = [stack.enter_context(place)]
        elif not server.headless:
            sockets = stack.enter_context(open_sockets(server, inherited))
        for sock in sockets:
            warn_if_open(server, sock)
        gate = None
        if server.listen is not None:
            key, has_tls = engine_key(server), config.link_certfile is not None
            gate = stack.enter_context(open_front_end_socket(server.listen, key, has_tls))
        admin = stack.enter_context(open_admin_socket(server.admin_listen)) if server.admin_listen else None
        ours = [*([] if inherited else sockets), *(sock for sock in (gate, admin) if sock is not None)]
        removers = [file_remover(sock) for sock in ours]
        keeps_answers = server.answers_listen is not None
        listening = Listening(sockets, tls, admin, removers, bool(inherited), gate, keeps_answers)
        return trio.run(run_server, config, server, listening, manager, early, companion)


@dataclass(frozen=True)
class Listening:
    """What listens already.

    Args:
        sockets: for the API; none for an engine without it.
        tls: encrypts their connections; None: nothing does.
        admin: for the admin endpoints, if they have a listener of their own.
        file_removers: remove the files of sockets, for exits that skip the cleanup.
        shared: another process listens for the API, too, and goes on when this stops.
        gate: for front ends.
        keeps_answers: whether front ends connect to ``sockets``, and no clients.
    """

    sockets: Sequence[socket.socket]
    tls: ssl.SSLContext | None
    admin: socket.socket | None
    file_removers: Sequence[Callable[[], object]]
    shared: bool = False
    gate: socket.socket | None = None
    keeps_answers: bool = False

    def remove_files(self) -> None:
        """Remove the files of unix sockets."""
        for remove in self.file_removers:
            remove()

    @property
    def url(self) -> str:
        """Where clients find the API, its first address; or front ends the engine."""
        if self.gate is not None:
            return shown(self.gate)
        return urls(self.sockets, "http" if self.tls is None else "https")[0]


def _server_child(child_id: str, serve: ChildFunction) -> ChildSpec:
    return ChildSpec(
        child_id, serve, shutdown=stop_budget.HTTP_SERVER, start_timeout=start_budget.HTTP_SERVER
    )


class Servers:
    """What serves around an engine, as its first children: the API, the gate for front ends, admin endpoints.

    Args:
        config: of the engine, or of a front end.
    """

    def __init__(self, config: EngineConfig, server: ServerConfig, listening: Listening) -> None:
        self._server = server
        self._listening = listening
        children = [
            _server_child(name, serve)
            for name, serve, wanted in (
                ("http", self._http, bool(listening.sockets)),
                ("gate", self._gate, listening.gate is not None),
                ("admin", self._admin, listening.admin is not None),
            )
            if wanted
        ]
        self.engine: Engine | RemoteEngine
        if server.connect is not None:
            self.engine = RemoteEngine(config, server, first_children=children)
        else:
            self.engine = Engine(config, first_children=children, find_model=find_model)
        self.host = EngineHost(self.engine)
        self._answers = Answers(self.engine, server) if listening.sockets else None

    async def _http(self, *, task_status: trio.TaskStatus[list[str]]) -> None:
        listening = self._listening
        if isinstance(self.engine, RemoteEngine):
            task_status.started([self._listening.url])
            task_status = trio.TASK_STATUS_IGNORED
            with trio.move_on_after(FRONT_END_PATIENCE):  # meanwhile other front ends accept, or nobody does
                await self.engine.wait_running()
        await serve_http(
            self.engine,
            self._server,
            sockets=listening.sockets,
            shutdown=self._shutdown,
            tls=listening.tls,
            shared=listening.shared,
            answers=self._answers,
            task_status=task_status,
        )

    async def _gate(self, *, task_status: trio.TaskStatus[None]) -> None:
        assert self._listening.gate is not None, "only a listener has this child"
        assert isinstance(self.engine, Engine), "a front end has no gate"
        gate = Gate(
            self.engine, engine_key(self._server), self.host.request_stop, link_tls(self.engine.config)
        )
        await gate.serve(self._listening.gate, task_status=task_status)

    async def _admin(self, *, task_status: trio.TaskStatus[list[str]]) -> None:
        assert self._listening.admin is not None, "only a listener has this child"
        await serve_admin(
            self.engine,
            self._server,
            sock=self._listening.admin,
            shutdown=self._shutdown,
            task_status=task_status,
        )

    def _shutdown(self, timeout: float | None) -> None:
        """Stop the engine, wherever it is; ``POST /admin/shutdown`` requests it."""
        if isinstance(self.engine, RemoteEngine):
            self.engine.request_engine_shutdown(timeout)
        else:
            self.host.request_stop(timeout)


async def run_server(
    config: EngineConfig,
    server: ServerConfig,
    listening: Listening,
    manager: ServiceManager,
    early: Sequence[signal.Signals],
    companion: Companion | None = None,
) -> int:
    """Run the engine with the servers as its first children until a signal stops it; return the exit status.

    Args:
        manager: is told how the server does.
        early: signals that came before they could be answered.
        companion: runs beside the engine.
    """
    servers = Servers(config, server, listening)
    engine, host = servers.engine, servers.host
    with host.watchdog:
        host.watchdog.cleanup = listening.remove_files
        async with trio.open_nursery() as nursery:
            await nursery.start(host.answer_signals)
            await nursery.start(host.answer_hangups)
            nursery.start_soon(manager.accompany, engine)
            if companion is not None:
                nursery.start_soon(companion, host)
            for number in early:
                signal.raise_signal(number)
            try:
                with suppress(StartCancelled):  # stopped before it had started; the report says how that went
                    await engine.run(task_status=Announcement(engine, listening, manager))
            finally:
                nursery.cancel_scope.cancel()
    assert engine.report is not None, "an engine that has stopped has a report"
    leave_soon(engine.report.exit_code)
    return engine.report.exit_code


class Announcement:
    """A task status for the engine, which announces on stdout, and to systemd, that the server is ready."""

    def __init__(self, engine: HostedEngine, listening: Listening, manager: ServiceManager) -> None:
        self._engine = engine
        self._listening = listening
        self._manager = manager
        self._began = trio.current_time()

    def started(self, value: object = None) -> None:
        """Print the address, the model and the duration of the start on one line."""
        seconds = trio.current_time() - self._began
        url = self._listening.url
        where = f"{url}/v1" if "://" in url else url  # a path of a socket has none below
        if self._listening.gate is not None:
            where = f"front ends connect to {url},"
        if self._listening.keeps_answers:
            where = f"stored answers of front ends at {url},"
        announce(f"ready: {where} model {self._engine.model_name} in {seconds:.1f} s\n")
        self._manager.ready(f"serving {self._engine.model_name} on {where}")


def find_model(config: EngineConfig) -> LocalModel:
    """Run `resolve` with progress on stderr, in a thread; it ends soon after the engine was stopped."""
    with progress_bar(stderr()) as show:

        def report(label: str, done: int, total: int | None) -> None:
            trio.from_thread.check_cancelled()
            show(label, done, total)

        return resolve(config, report)
