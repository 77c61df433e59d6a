"""``ullm serve``: the engine and its HTTP server as one tree, until a signal ends it."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import trio

from ullm.cli.terminal import progress_bar, stderr
from ullm.config import EngineConfig, ServerConfig
from ullm.engine import Engine
from ullm.errors import StartCancelled
from ullm.hub import LocalModel, resolve
from ullm.logs import configure, get_logger
from ullm.server import (
    bind,
    file_remover,
    open_admin_socket,
    raise_limit,
    serve_admin,
    serve_http,
    urls,
)
from ullm.supervision import ChildSpec
from ullm.supervision.signals import (
    STOP_SIGNALS,
    Watchdog,
    forced_exit_code,
    leave_now,
    remember_signals,
    signal_ladder,
)

log = get_logger("ullm.serve")

HTTP_BUDGET = 2.0
"""Seconds for the server to flush and close connections, within the engine's one deadline."""
WATCHDOG_MARGIN = 5.0
"""Seconds past the deadline after which a process that still hangs is ended by force."""

RELOAD_SIGNALS = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
"""Windows has none."""
LEAVE_NOW_WITHIN = 1.0
"""Seconds from the third signal to the end of a process whose event loop is stuck."""

LEAVE_WITHIN = 3.0
"""Seconds from the end of the engine to the end of the process."""


def serve(config: EngineConfig, server: ServerConfig) -> int:
    """Listen, load, serve; the exit status, as docs/configuration.md lists them.

    Raises:
        PortTaken: before anything is loaded.
        UllmError: the engine could not start, or failed.
    """
    early = remember_signals()
    raise_limit()
    configure(config.log_level)
    with bind(server) as listener:
        if server.admin_listen is None:
            return trio.run(run_server, config, server, listener, None, early)
        with open_admin_socket(server.admin_listen) as admin_listener:
            return trio.run(run_server, config, server, listener, admin_listener, early)


async def run_server(
    config: EngineConfig,
    server: ServerConfig,
    listener: socket.socket,
    admin_listener: socket.socket | None,
    early: Sequence[signal.Signals],
) -> int:
    """The engine with the servers as its first children, and the signals that stop all.

    Args:
        early: signals that came before they could be answered.
    """

    async def http(*, task_status: trio.TaskStatus[list[str]]) -> None:
        await serve_http(engine, server, sockets=[listener], shutdown=drain, task_status=task_status)

    async def admin(*, task_status: trio.TaskStatus[list[str]]) -> None:
        assert admin_listener is not None, "only a listener has this child"
        await serve_admin(engine, server, sock=admin_listener, shutdown=drain, task_status=task_status)

    def drain(timeout: float | None, by: str = "admin") -> None:
        watchdog.arm((engine.config.shutdown_timeout if timeout is None else timeout) + WATCHDOG_MARGIN)
        engine.request_shutdown(timeout, by=by)

    servers = [ChildSpec("http", http, shutdown=HTTP_BUDGET)]
    if admin_listener is not None:
        servers.append(ChildSpec("admin", admin, shutdown=HTTP_BUDGET))
    engine = Engine(config, first_children=servers, find_model=find_model)
    with Watchdog() as watchdog:
        if admin_listener is not None:
            watchdog.cleanup = file_remover(admin_listener)
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(answer_signals, engine, watchdog, drain))
            await nursery.start(answer_hangups, engine)
            for number in early:
                signal.raise_signal(number)
            try:
                with suppress(StartCancelled):  # asked to stop before; the report says how that went
                    await engine.run(task_status=Announcement(engine, listener))
            finally:
                nursery.cancel_scope.cancel()
    for number in (*STOP_SIGNALS, *RELOAD_SIGNALS):
        signal.signal(number, signal.SIG_IGN)  # too late to change how this ends
    assert engine.report is not None, "an engine that has stopped has a report"
    code = engine.report.exit_code
    # What still holds the process then, a thread or a library, does not hold it for long.
    Watchdog(exit_code=code).arm(LEAVE_WITHIN)
    return code


async def answer_signals(
    engine: Engine,
    watchdog: Watchdog,
    drain: Callable[[float | None, str], None],
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """First signal: drain. Second: end requests now. Third: leave now."""

    def drain_by(number: signal.Signals) -> None:
        drain(None, number.name)

    def hurry(number: signal.Signals) -> None:
        engine.expedite()

    def kill(number: signal.Signals) -> None:
        engine.kill(number)
        try:
            watchdog.cleanup()
        finally:
            leave_now(number)

    def at_once(number: signal.Signals, count: int) -> None:
        """In the handler itself: the event loop, which the rest of the ladder needs, may be stuck."""
        if count <= 2:
            watchdog.arm(WATCHDOG_MARGIN + (engine.config.shutdown_timeout if count == 1 else 0.0))
        else:
            watchdog.exit_code = forced_exit_code(number)
            watchdog.arm(LEAVE_NOW_WITHIN)

    await signal_ladder(drain_by, hurry, kill, at_once=at_once, task_status=task_status)


async def answer_hangups(engine: Engine, *, task_status: trio.TaskStatus[None]) -> None:
    """SIGHUP loads the model again, unless ``nohup`` has it ignored, or the system has none."""
    heard = [number for number in RELOAD_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    if not heard:  # trio would refuse to wait for none
        task_status.started()
        return
    with trio.open_signal_receiver(*heard) as received:
        task_status.started()
        async for number in received:
            log.info("signal received", signal=signal.Signals(number).name, action="reload")
            engine.request_reload()


class Announcement:
    """The engine's task status: says on stdout that the server is ready."""

    def __init__(self, engine: Engine, listener: socket.socket) -> None:
        self._engine = engine
        self._url = urls([listener])[0]
        self._began = trio.current_time()

    def started(self, value: object = None) -> None:
        """One line with the address, the model, and how long it took."""
        seconds = trio.current_time() - self._began
        sys.stdout.write(f"ready: {self._url}/v1 model {self._engine.model_name} in {seconds:.1f} s\n")
        sys.stdout.flush()


def find_model(config: EngineConfig) -> LocalModel:
    """`resolve` with progress on stderr; ends soon when the engine is stopped. Called in a thread."""
    with progress_bar(stderr()) as show:

        def report(label: str, done: int, total: int | None) -> None:
            trio.from_thread.check_cancelled()
            show(label, done, total)

        return resolve(config, report)
