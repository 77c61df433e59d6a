"""``--api-server-count N``: an engine and N front ends as processes of their own, under one supervisor.

All front ends accept from one socket that listens here, so a connection that waits in its queue outlives each
of them. One more keeps the stored answers for the others. A stop goes through the front ends first, at the
same time, and then to the engine.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import NamedTuple

import trio

from ullm.cli.orders import Order
from ullm.cli.part import Part
from ullm.cli.systemd import ServiceManager
from ullm.cli.terminal import announce
from ullm.config import EngineConfig, ServerConfig
from ullm.errors import EngineDead, ResourceUnavailable
from ullm.hosting.engine_host import RELOAD_SIGNALS, leave_soon
from ullm.hosting.front_end_listener import open_front_end_socket
from ullm.logs import configure, get_logger
from ullm.protocol import stop_budget
from ullm.protocol.exit_codes import EXIT_ABANDONED, EXIT_OK
from ullm.server import file_remover, inherited_sockets, open_sockets, raise_limit, tls_context, warn_if_open
from ullm.supervision import (
    ChildSpec,
    Restart,
    RestartLimitReached,
    Supervisor,
    Watchdog,
    exponential_backoff,
    leave_now,
    open_supervisor,
    remember_signals,
    root_cause,
    signal_ladder,
    supervisor_child,
)

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0
"""Seconds before a part is started again: they double from the first to the longest."""

log = get_logger(__name__)


def launch(config: EngineConfig, server: ServerConfig) -> int:
    """Serve by several processes until a signal ends them; return the exit status.

    Raises:
        PortTaken, ConfigError: before anything is started.
        EngineDead: a part of it ended again and again.
    """
    if sys.platform == "win32":
        raise ResourceUnavailable(
            "--api-server-count needs a POSIX system; start one front end per port by --connect"
        )
    early = remember_signals()
    raise_limit()
    configure(config.log_level, as_json=config.log_format == "json")
    tls_context(server.ssl_certfile, server.ssl_keyfile, http2=server.http2)  # its errors come now, once
    manager = ServiceManager.from_environment(os.environ)
    inherited = inherited_sockets(os.environ)
    with ExitStack() as stack:
        sockets = stack.enter_context(open_sockets(server, inherited))
        for sock in sockets:
            warn_if_open(server, sock)
        link, answers = stack.enter_context(_meeting_places())
        kept = stack.enter_context(open_front_end_socket(answers, option="--answers-listen"))
        places = Places(link, answers, tuple(sock.fileno() for sock in sockets), (kept.fileno(),))
        removers = [] if inherited else [file_remover(sock) for sock in sockets]
        launcher = Launcher(config, server, places)
        return trio.run(launcher.run, manager, early, removers)


@contextmanager
def _meeting_places() -> Iterator[tuple[str, str]]:
    """Return where the engine, and who keeps answers, listens; nothing of it is left by any end."""
    if sys.platform == "linux":
        name = f"unix:@ullm-{secrets.token_hex(16)}"  # no file; the kernel tells who connects
        yield name, f"{name}-answers"
        return
    with tempfile.TemporaryDirectory(prefix="ullm-") as folder:
        yield f"unix:{folder}/engine", f"unix:{folder}/answers"


class Places(NamedTuple):
    """Where the parts meet each other, and clients.

    Args:
        link: where the engine will listen.
        answers: where the stored answers are.
        sockets: descriptors that listen for the API.
        answers_sockets: descriptors that listen at ``answers``.
    """

    link: str
    answers: str
    sockets: tuple[int, ...]
    answers_sockets: tuple[int, ...]


_OF_CLIENTS = (
    *("host", "uds", "api_key", "api_key_file", "ssl_certfile", "ssl_keyfile", "http2", "admin_key"),
    *("access_log", "cors_origins", "allowed_hosts", "admin_listen"),
)
"""Options about connections of clients, which only the front ends have."""


class Orders(NamedTuple):
    """What the engine, who keeps the stored answers, and each front end is to be."""

    engine: Order
    answers: Order
    front_end: Order


def orders(config: EngineConfig, server: ServerConfig, places: Places) -> Orders:
    """Return what the parts are to be."""
    defaults = ServerConfig()
    link, answers = places.link, places.answers
    engine = dataclasses.replace(defaults, headless=True, listen=link, admin_listen=server.admin_listen)
    front_end = dataclasses.replace(
        server, connect=link, answers=answers, api_server_count=1, admin_listen=None
    )
    unset = {name: getattr(defaults, name) for name in _OF_CLIENTS}
    keeper = dataclasses.replace(front_end, answers=None, answers_listen=answers, **unset)
    # The engine's teardown comes after the front ends' drain, within the same deadline.
    drain = max(0.0, config.shutdown_timeout - stop_budget.TEARDOWN_RESERVE)
    own = EngineConfig(
        shutdown_timeout=drain,
        log_level=config.log_level,
        log_format=config.log_format,
        max_restarts=config.max_restarts,
        restart_period=config.restart_period,
    )
    return Orders(
        Order(config, engine),
        Order(own, keeper, places.answers_sockets),
        Order(own, front_end, places.sockets),
    )


class Launcher:
    """Starts the parts, starts them again, and stops them in order."""

    def __init__(self, config: EngineConfig, server: ServerConfig, places: Places) -> None:
        self._config = config
        engine, answers, front_end = orders(config, server, places)
        self.engine = Part("engine", engine, self._note)
        self.answers = Part("answers", answers, self._note)
        self.front_ends = [
            Part(f"front-end{number}", front_end, self._note) for number in range(server.api_server_count)
        ]
        self._requested = trio.Event()
        self._draining = trio.CancelScope()
        self._deadline = float("inf")
        self._ready = trio.Event()
        self._exit_code = EXIT_OK
        self._watchdog = Watchdog(exit_code=EXIT_ABANDONED)

    @property
    def parts(self) -> list[Part]:
        """The engine, and then those that connect to it."""
        return [self.engine, *self._connected]

    @property
    def _connected(self) -> list[Part]:
        return [self.answers, *self.front_ends]

    async def wait_stop_requested(self) -> None:
        """Wait until a stop is requested, by whomever."""
        await self._requested.wait()

    async def run(
        self,
        manager: ServiceManager,
        early: Sequence[signal.Signals],
        removers: Sequence[Callable[[], object]],
    ) -> int:
        """Run until a signal, or the end of the engine, stops it; return the exit status."""
        began = trio.current_time()
        with self._watchdog:
            self._watchdog.cleanup = partial(_call_all, [*(part.kill for part in self.parts), *removers])
            async with trio.open_nursery() as nursery:
                await nursery.start(self._answer_signals)
                await nursery.start(self._answer_hangups)
                nursery.start_soon(manager.accompany, self)
                nursery.start_soon(self._announce, manager, began)
                for number in early:
                    signal.raise_signal(number)
                await self._supervise()
                nursery.cancel_scope.cancel()
        leave_soon(self._exit_code)
        return self._exit_code

    async def _supervise(self) -> None:
        try:
            async with open_supervisor("launcher", list(map(self._child, self.parts)), intensity=0) as root:
                await self._requested.wait()
                await self._stop(root)
        except BaseException as error:
            cause = root_cause(error)
            if isinstance(cause, RestartLimitReached):
                raise EngineDead(
                    f"a part of the server ended again and again: {_first_line(cause)}"
                ) from error
            raise

    def _child(self, part: Part) -> ChildSpec:
        """Return a part under a supervisor of its own: the ends of others do not delay its next start."""
        child = ChildSpec(
            part.name,
            part.run,
            restart=Restart.TRANSIENT,
            shutdown=stop_budget.engine_seconds(self._config.shutdown_timeout),
            kill=part.kill,
        )
        return supervisor_child(
            part.name,
            [child],
            intensity=self._config.max_restarts,
            period=self._config.restart_period,
            restart_delay=exponential_backoff(FIRST_PAUSE, LONGEST_PAUSE),
        )

    # --- starting ------------------------------------------------------------------------------------------

    async def _announce(self, manager: ServiceManager, began: float) -> None:
        """Say once that all parts are ready, as a server of one process does."""
        for part in self.parts:
            await part.ready.wait()
        self._ready.set()
        where = self.front_ends[0].said.rpartition(" in ")[0]
        announce(f"{where} in {trio.current_time() - began:.1f} s\n")
        manager.ready(where)

    def _note(self, part: Part, status: int) -> bool:
        """Decide about the end of a part: return whether it is to be started again."""
        if self._requested.is_set():
            return False
        if not self._ready.is_set() and status != EXIT_OK:
            log.error("could not start", part=part.name, exit_status=status)
            self._exit_code = status if status > 0 else EXIT_ABANDONED
            self.request_stop(part.name)
            return False
        if part is self.engine and status == EXIT_OK:
            self.request_stop("the engine's end")
            return False
        log.warning("part lost; it is started again", part=part.name, exit_status=status)
        return True

    # --- stopping ------------------------------------------------------------------------------------------

    def request_stop(self, by: str) -> None:
        """Begin the orderly stop; return at once."""
        if not self._requested.is_set():
            log.info("stopping", by=by)
            seconds = self._config.shutdown_timeout
            self._watchdog.arm(stop_budget.watchdog_seconds(seconds))
            self._deadline = trio.current_time() + stop_budget.engine_seconds(seconds)
            self._draining.deadline = self._deadline - stop_budget.LAUNCHER_RESERVE
            self._requested.set()

    async def _stop(self, root: Supervisor) -> None:
        """Drain all front ends, and the stored answers, at the same time, then stop the engine."""
        for part in self._connected:
            part.signal(signal.SIGTERM)
        with self._draining:
            for part in self._connected:
                await part.wait_gone()
        self.engine.signal(signal.SIGTERM)
        await root.stop(self._deadline)

    async def _answer_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        await signal_ladder(
            lambda number: self.request_stop(number.name), self._hurry, self._leave, task_status=task_status
        )

    def _hurry(self, number: signal.Signals) -> None:
        """Have all parts skip the rest of their drain."""
        self._watchdog.arm(stop_budget.watchdog_seconds(0.0))
        for part in self._connected:
            part.signal(signal.SIGTERM)

    def _leave(self, number: signal.Signals) -> None:
        for part in self.parts:
            part.kill()
        leave_now(number)

    async def _answer_hangups(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Pass SIGHUP on to the engine, which reloads its model."""
        signals = [number for number in RELOAD_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        if not signals:
            task_status.started()
            return
        with trio.open_signal_receiver(*signals) as received:
            task_status.started()
            async for number in received:
                self.engine.signal(signal.Signals(number))


def _call_all(functions: Sequence[Callable[[], object]]) -> None:
    for function in functions:
        with suppress(OSError):
            function()


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
