"""The supervision tree of an engine, from its start to its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from ullm.actors.router import Router
from ullm.actors.tokenizer import TokenizerActor
from ullm.engine.calibration import calibrate_for_next_start
from ullm.engine.current_model import CurrentModel, FindModel
from ullm.engine.fleet import Fleet
from ullm.engine.life import EngineLife
from ullm.engine.lifecycle import Lifecycle
from ullm.engine.loop_holds import LoopHolds
from ullm.engine.sampling_defaults import read_sampling_defaults
from ullm.engine.state import EngineState
from ullm.engine.stop import EngineStop
from ullm.errors import AdapterUnusable, ResourceUnavailable, StartCancelled, first_cause
from ullm.faults import FaultInjector
from ullm.logs import get_logger
from ullm.protocol import start_budget, stop_budget
from ullm.protocol.messages import Adapter, ModelInfo
from ullm.supervision import ChildInfo, ChildSpec, Supervisor, open_supervisor

log = get_logger(__name__)


class OtherHosts(Protocol):
    """Where workers run, if not all of them are on the engine's own host."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Hold the connection to them, until cancelled."""

    def connected(self) -> dict[int, str]:
        """Return the index and name of each that the engine knows by an agent of ullm's."""


@dataclass(frozen=True)
class EngineParts:
    """What an engine is made of."""

    life: EngineLife
    current: CurrentModel
    router: Router
    fleet: Fleet
    lifecycle: Lifecycle
    stop: EngineStop
    faults: FaultInjector
    hosts: OtherHosts | None = None
    loop_holds: LoopHolds = field(default_factory=LoopHolds)


class EngineTree:
    """Starts the children in order, and supervises them until the engine has stopped.

    Args:
        first_children: start before all others and stop after them.
        find_model: see `find_local_model`.
    """

    def __init__(
        self, parts: EngineParts, first_children: Sequence[ChildSpec], find_model: FindModel
    ) -> None:
        self._parts = parts
        self._first_children = list(first_children)
        self._find_model = find_model
        self._root: Supervisor | None = None
        self._background: trio.Nursery  # since run() began
        self._tasks: list[Callable[[], Awaitable[object]]] = []
        self._first_adapters: list[Adapter] = []

    def children(self) -> tuple[ChildInfo, ...]:
        """Return the tree as it is now; empty before it is started."""
        return self._root.which_children() if self._root is not None else ()

    def start_soon(self, task: Callable[[], Awaitable[object]]) -> None:
        """See `Engine.start_soon`."""
        if self._parts.life.state is EngineState.STARTING:
            self._tasks.append(task)
        else:
            self._background.start_soon(run_task, task)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """See `Engine.run`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._notice_cancellation)
            self._background = nursery
            try:
                with trio.CancelScope(shield=True):
                    await self._run_to_end(task_status)
            finally:
                nursery.cancel_scope.cancel()
        life = self._parts.life
        if life.failure is not None:
            raise life.dead()
        if not life.started:
            raise StartCancelled

    async def _notice_cancellation(self) -> None:
        """Request a stop when the scope around the engine is cancelled; the tree itself is shielded."""
        try:
            await trio.sleep_forever()
        finally:
            self._parts.stop.request(None, by="cancelled")

    async def _run_to_end(self, task_status: trio.TaskStatus[None]) -> None:
        life, fleet, stop = self._parts.life, self._parts.fleet, self._parts.stop
        try:
            with stop.starting:
                await self._supervise(task_status)
        except BaseException as error:
            cause = first_cause(error)
            if not isinstance(cause, Exception):
                raise
            if life.state is EngineState.STARTING:
                raise cause from error
            stop.fail(cause)
        finally:
            stop.finish([report for replica in fleet.replicas for report in replica.group.stop_reports])

    async def _supervise(self, task_status: trio.TaskStatus[None]) -> None:
        life, current, fleet = self._parts.life, self._parts.current, self._parts.fleet
        async with open_supervisor(
            "engine",
            self._first_children,
            intensity=current.config.max_restarts,
            period=current.config.restart_period,
            on_opened=self._take_root,
        ) as root:
            for child in await self._other_children():
                await root.start_child(child)
            info = fleet.replicas[0].group.info
            assert info is not None, "a group that has started knows its model"
            current.serve(info)
            await fleet.wait_up()
            await self._load_adapters()
            with self._telling_readers(root), self._parts.loop_holds.watching():
                life.run()
                log.info("engine running", model=current.config.model_name)
                task_status.started()
                self._background.start_soon(self._calibrate_until_stop, info)
                for task in self._tasks:
                    self._background.start_soon(run_task, task)
                await self._parts.stop.requested.wait()
                await self._parts.stop.run(root, self._parts.lifecycle)

    async def _load_adapters(self) -> None:
        """Load the adapters that the configuration names.

        Raises:
            ConfigError: one cannot be used with this model.
        """
        current = self._parts.current
        for adapter in self._first_adapters:
            try:
                await self._parts.fleet.keep_adapter(adapter)
            except AdapterUnusable as error:
                raise ResourceUnavailable(f"--lora: {error}") from error
            current.adapters.put(adapter)
            log.info("adapter loaded", adapter=adapter.name, path=adapter.path)

    async def _calibrate_until_stop(self, info: ModelInfo) -> None:
        current, stop = self._parts.current, self._parts.stop
        assert current.local is not None, "an engine that runs has a model"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calibrate_for_next_start, current.config, str(current.local.path), info)
            await stop.requested.wait()
            nursery.cancel_scope.cancel()

    def _take_root(self, root: Supervisor) -> None:
        """Make the tree visible while it starts."""
        self._root = root
        self._parts.fleet.supervised_by(root)

    async def _other_children(self) -> list[ChildSpec]:
        """Find the model's files, by a download of minutes maybe; return the children that need them."""
        parts, current = self._parts, self._parts.current
        current.local = await trio.to_thread.run_sync(self._find_model, current.config)
        current.sampling_defaults = read_sampling_defaults(current.config, current.local)
        self._first_adapters = await current.adapters.read_all(current.config.lora_paths)
        current.tokenizer = TokenizerActor(current.local, parts.faults)
        hosts = []
        if parts.hosts is not None:
            hosts = [
                ChildSpec(
                    "hosts", parts.hosts.run, shutdown=stop_budget.HOSTS, start_timeout=start_budget.ACTOR
                )
            ]
        return [
            *hosts,
            ChildSpec(
                "tokenizer",
                current.tokenizer.run,
                shutdown=stop_budget.TOKENIZER,
                start_timeout=start_budget.TOKENIZER,
            ),
            *parts.fleet.specs(current.local),
            ChildSpec(
                "router", parts.router.run, shutdown=stop_budget.ROUTER, start_timeout=start_budget.ACTOR
            ),
            ChildSpec(
                "lifecycle",
                parts.lifecycle.run,
                shutdown=stop_budget.LIFECYCLE,
                start_timeout=start_budget.ACTOR,
            ),
        ]

    @contextmanager
    def _telling_readers(self, root: Supervisor) -> Iterator[None]:
        """If the root gives up, tell readers at once, while those that write to clients still run."""
        try:
            yield
        except trio.Cancelled:
            if root.failure is not None:
                self._parts.stop.fail(first_cause(root.failure))
            raise


async def run_task(task: Callable[[], Awaitable[object]]) -> None:
    """Run a background task; an error of it is logged."""
    try:
        await task()
    except Exception as error:
        log.error("a background task failed", cause=str(error) or type(error).__name__, exc_info=True)
