"""The supervision tree of a front end: its servers, its connection to the engine, its tokenizer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from ullm.engine.current_model import CurrentModel
from ullm.engine.life import EngineLife
from ullm.engine.state import EngineState
from ullm.engine.stop import EngineStop
from ullm.engine.tree import run_task
from ullm.errors import StartCancelled, first_cause
from ullm.link.connection import Connection
from ullm.link.engine_view import EngineSeen
from ullm.logs import get_logger
from ullm.protocol import start_budget, stop_budget
from ullm.supervision import ChildSpec, open_supervisor

log = get_logger(__name__)


class _Sleeper(Protocol):
    async def wake(self) -> object:
        """Wake the engine."""


class FrontEndTree:
    """Starts the children in order, and supervises them until the front end has stopped.

    Args:
        first_children: start before all others and stop after them.
        engine: is woken, if it sleeps on requests that are to be drained.
    """

    def __init__(
        self,
        life: EngineLife,
        current: CurrentModel,
        seen: EngineSeen,
        connection: Connection,
        stop: EngineStop,
        first_children: Sequence[ChildSpec],
        engine: _Sleeper,
    ) -> None:
        self._life = life
        self._current = current
        self._seen = seen
        self._connection = connection
        self._stop = stop
        self._first_children = list(first_children)
        self._engine = engine
        self._background: trio.Nursery  # since run() began
        self._tasks: list[Callable[[], Awaitable[object]]] = []

    def start_soon(self, task: Callable[[], Awaitable[object]]) -> None:
        """See `Engine.start_soon`."""
        if self._life.state is EngineState.STARTING:
            self._tasks.append(task)
        else:
            self._background.start_soon(run_task, task)

    @property
    def state(self) -> str:
        """Whether the engine sleeps; implements `Wakes`."""
        return self._seen.sleep_state

    async def wake(self) -> None:
        """Wake the engine; implements `Wakes`."""
        await self._engine.wake()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """See `RemoteEngine.run`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._notice_cancellation)
            self._background = nursery
            try:
                with trio.CancelScope(shield=True):
                    await self._run_to_end(task_status)
            finally:
                nursery.cancel_scope.cancel()
        if self._life.failure is not None:
            raise self._life.dead()
        if not self._life.started:
            raise StartCancelled

    async def _notice_cancellation(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._stop.request(None, by="cancelled")

    async def _run_to_end(self, task_status: trio.TaskStatus[None]) -> None:
        try:
            with self._stop.starting:
                await self._supervise(task_status)
        except BaseException as error:
            cause = first_cause(error)
            if not isinstance(cause, Exception):
                raise
            if self._life.state is EngineState.STARTING:
                raise cause from error
            self._stop.fail(cause)
        finally:
            self._stop.finish([])

    async def _supervise(self, task_status: trio.TaskStatus[None]) -> None:
        link = ChildSpec(
            "link", self._connection.run, shutdown=stop_budget.LINK, start_timeout=start_budget.ACTOR
        )
        waiting = ChildSpec(
            "patience", self._watch_absence, shutdown=stop_budget.LINK, start_timeout=start_budget.ACTOR
        )
        config = self._current.config
        async with open_supervisor(
            "front end",
            [*self._first_children, link, waiting],
            intensity=config.max_restarts,
            period=config.restart_period,
        ) as root:
            await self._wait_for_engine()
            tokenizer = self._current.tokenizer
            assert tokenizer is not None, "it comes with the model"
            await root.start_child(
                ChildSpec(
                    "tokenizer",
                    tokenizer.run,
                    shutdown=stop_budget.TOKENIZER,
                    start_timeout=start_budget.TOKENIZER,
                )
            )
            self._life.run()
            log.info("front end running", model=self._current.config.model_name)
            task_status.started()
            for task in self._tasks:
                self._background.start_soon(run_task, task)
            await self._stop.requested.wait()
            await self._stop.run(root, self)

    async def _watch_absence(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await self._seen.watch_absence()

    async def _wait_for_engine(self) -> None:
        """Wait until an engine runs at the other end; it may be loading its model.

        Raises:
            LinkRefused: it does not let this front end in.
        """
        await self._connection.first_try.wait()
        if self._connection.refusal is not None:
            raise self._connection.refusal
        await self._seen.first_model.wait()
