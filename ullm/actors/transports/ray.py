"""A worker as a Ray actor, on a machine where Ray finds the resources for it.

Needs the package ``ray``. The worker loop runs in a thread of the actor; one of its methods takes messages,
another one waits for answers. An actor sees only the GPU that Ray has assigned to it. Ray itself forwards
the worker's prints.

The ranks of one incarnation of a replica are one placement group: Ray gives all of them a place, or none.
When a node is lost, so are its actors; the next incarnation gets places on the nodes that are left, or waits
for one.
"""

from __future__ import annotations

import importlib
import math
import os
import queue
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from ullm.actors.transports.background import background_tasks
from ullm.actors.transports.base import StopReport, Transport, WorkerSpec
from ullm.errors import WorkerLost
from ullm.hub import resolve
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.protocol.messages import FromWorker, Progress, Start, Stop, Stopped, ToWorker
from ullm.system.interfaces import interface_of
from ullm.worker.loop import IMPORT_BUDGET, Inbox, failed, load_runner, run_worker

ray: Any = importlib.import_module("ray")

WAIT_SECONDS = 10.0
"""After which a log line says what Ray has not done yet: found a place, or started a process there."""

log = get_logger(__name__)


# --- on the worker's node ---------------------------------------------------------------------------


class RankActor:
    """The Ray actor. Each method has a thread of its own, so calls of one method run in order."""

    def __init__(self, runner: str) -> None:
        self._inbox: Inbox = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[FromWorker | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(runner,), daemon=True).start()

    @ray.method(concurrency_group="put")  # type: ignore[untyped-decorator]  # Ray has no types here
    def put(self, message: ToWorker) -> None:
        """Queue a message for the worker."""
        if isinstance(message, Start):
            try:
                message = on_this_node(message, ray.util.get_node_ip_address())
            except Exception as error:  # the engine gets whatever it is
                self._outbox.put(failed(error))
                return
        self._inbox.put(message)

    @ray.method(concurrency_group="get")  # type: ignore[untyped-decorator]
    def get(self) -> list[FromWorker | None]:
        """Wait for messages of the worker, and return all there are; None marks the end."""
        messages = [self._outbox.get()]
        while not self._outbox.empty():
            messages.append(self._outbox.get())
        return messages

    def _work(self, path: str) -> None:
        try:
            self._outbox.put(Progress("import", IMPORT_BUDGET))
            run_worker(load_runner(path), self._inbox, self._outbox.put)
        except Exception as error:
            self._outbox.put(failed(error))
        self._outbox.put(None)


def on_this_node(start: Start, address: str) -> Start:
    """Return a start with what is different on this node: GPU, meeting point, the model's files.

    Args:
        address: of this node, by which others reach it.

    Raises:
        ModelError: the files are not here, and cannot be fetched.
    """
    rank = start.rank
    if rank.device_index is not None:
        rank = msgspec.structs.replace(rank, device_index=0)  # the only one that Ray shows
    if rank.world_size > 1:
        if interface := interface_of(address):
            for library in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
        rank = msgspec.structs.replace(rank, shares_memory=False)  # the others may be elsewhere
        if rank.rank == 0:
            rank = msgspec.structs.replace(rank, rendezvous=f"{address}:0")
    start = msgspec.structs.replace(start, rank=rank)
    if Path(start.model_path).is_absolute() and not Path(start.model_path).exists():
        local = resolve(start.config)
        start = msgspec.structs.replace(
            start, model_path=str(local.path), tokenizer_path=str(local.tokenizer_path)
        )
    return start


# --- on the engine's node ---------------------------------------------------------------------------


class RayWorkers:
    """Starts workers as Ray actors. `run` is a child of the engine, which holds the connection to Ray."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], RankGroup] = {}

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Stay connected to Ray until cancelled: to the cluster that RAY_ADDRESS names or that runs here.

        Where there is none, one is started on this machine, and ended with the engine.
        """
        was_connected = ray.is_initialized()
        await _connect()
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            if not was_connected:
                with trio.CancelScope(shield=True), trio.move_on_after(stop_budget.RAY_LEAVE):
                    await trio.to_thread.run_sync(ray.shutdown, abandon_on_cancel=True)

    def connected(self) -> dict[int, str]:
        """Return nothing: Ray's nodes have no agents of ullm's."""
        return {}

    @asynccontextmanager
    async def open(self, spec: WorkerSpec) -> AsyncIterator[Transport]:
        """Start a worker as a Ray actor; leaving the context kills it. An `OpenTransport`."""
        await _connect()
        key = spec.rank.replica, spec.rank.epoch
        group = self._groups.setdefault(key, RankGroup(spec))
        group.ranks += 1
        try:
            transport = RayTransport(spec, group)
            async with background_tasks() as nursery:
                nursery.start_soon(transport.run)
                try:
                    yield transport
                finally:
                    await transport.leave()
        finally:
            group.ranks -= 1
            if not group.ranks:
                del self._groups[key]
                await group.remove()


class RankGroup:
    """The places of a replica's ranks."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.ranks = 0
        self.resources: dict[str, float] = {}
        self._spec = spec
        self._group: Any = None
        self._placing = threading.Lock()

    def place(self, rank: int) -> Any:
        """Return where an actor of that rank is to run; in a thread, since it asks the cluster what it has.

        Ray decides in the background.
        """
        with self._placing:
            if self._group is None:
                self.resources = _resources(self._spec)
                bundles = [self.resources] * self._spec.rank.world_size
                self._group = ray.util.placement_group(bundles, strategy="PACK")
        return ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=rank
        )

    def is_placed(self) -> bool:
        """Whether Ray has found places for all ranks; in a thread, since it asks the cluster."""
        return bool(ray.util.placement_group_table(self._group).get("state") == "CREATED")

    async def remove(self) -> None:
        """Give the places back."""
        if self._group is not None:
            with trio.CancelScope(shield=True), trio.move_on_after(stop_budget.RAY_LEAVE):
                remove = ray.util.remove_placement_group
                await trio.to_thread.run_sync(remove, self._group, abandon_on_cancel=True)


class RayTransport:
    """See `Transport`."""

    def __init__(self, spec: WorkerSpec, group: RankGroup) -> None:
        self._name = spec.rank.name
        self._spec, self._group = spec, group
        self._actor: Any = None
        self._on_asyncio: Any = None
        self._has_actor = trio.Event()
        self._deliver, self._delivered = trio.open_memory_channel[FromWorker](math.inf)
        self._ended = trio.Event()
        self._killed = self._heard = False
        self._cause = "ended"
        self._stopped: Stopped | None = None

    @property
    def name(self) -> str:
        """As in logs."""
        return self._name

    @property
    def pid(self) -> None:
        """The process belongs to Ray, and may be on another machine."""
        return None

    def alive(self) -> bool:
        """Whether the actor runs, as far as Ray has reported."""
        return not self._killed and not self._ended.is_set()

    def suspended(self) -> bool:
        """Return False: the state on another machine is unknown."""
        return False

    async def send(self, message: ToWorker) -> None:
        """Pass one message to Ray."""
        await self._has_actor.wait()
        if not self.alive():
            raise WorkerLost(self._name, self._cause)
        self._actor.put.remote(message)

    async def receive(self) -> FromWorker:
        """Return the next message; those sent before the end come first."""
        try:
            return await self._delivered.receive()
        except trio.EndOfChannel:
            raise WorkerLost(self._name, self._cause) from None

    def kill(self) -> None:
        """Kill the actor's process."""
        if self.alive():
            self._killed = True
            self._cause = "was killed through Ray"
            self._kill_actor()

    async def stop(self, budget: float) -> StopReport:
        """Send `Stop`, and kill the actor after nine tenths of the budget."""
        began = trio.current_time()
        was_alive = self.alive()
        if was_alive and self._actor is not None:
            self._actor.put.remote(Stop(stop_budget.RAY_KILL_SHARE * budget))
            with trio.move_on_after(stop_budget.RAY_KILL_SHARE * budget):
                await self._ended.wait()
            if not self._ended.is_set():
                self.kill()
        outcome = "stopped" if self._stopped else "killed" if was_alive else "lost"
        timings = self._stopped.timings if self._stopped else {}
        return StopReport(self._name, outcome, trio.current_time() - began, timings)

    async def leave(self) -> None:
        """Kill the actor: even one that ended in order keeps its process until then."""
        self._killed = True
        self._kill_actor()
        with trio.move_on_after(stop_budget.RAY_LEAVE, shield=True):
            await self._ended.wait()

    async def run(self) -> None:
        """Start the actor, and forward its messages until it ends."""
        # Not before it is needed: its import replaces asyncio's event loop policy in the whole process.
        import trio_asyncio  # type: ignore[import-untyped]

        try:
            # An actor that nobody has a handle of is ended by Ray itself.
            self._actor = await trio.to_thread.run_sync(
                _start_actor, self._spec, self._group, abandon_on_cancel=True
            )
            self._has_actor.set()
            async with trio.open_nursery() as nursery, trio_asyncio.open_loop():
                nursery.start_soon(self._say_that_it_waits)
                self._on_asyncio = trio_asyncio.aio_as_trio(_run)
                while (messages := await self._messages())[-1] is not None:
                    self._take(messages)
                self._take(messages[:-1])
                nursery.cancel_scope.cancel()
        except* ray.exceptions.RayError as group:
            error = group.exceptions[0]
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            if not self._killed:
                self._cause = f"was lost by Ray: {(str(error).splitlines() or [''])[0]}"
        finally:
            self._has_actor.set()
            self._ended.set()
            self._deliver.close()

    async def _messages(self) -> list[FromWorker | None]:
        reference = self._actor.get.remote()

        async def wait() -> list[FromWorker | None]:
            return await reference  # type: ignore[no-any-return]

        messages: list[FromWorker | None] = await self._on_asyncio(wait)
        self._heard = True
        return messages

    async def _say_that_it_waits(self) -> None:
        await trio.sleep(WAIT_SECONDS)
        if self._heard:
            return
        if await trio.to_thread.run_sync(self._group.is_placed, abandon_on_cancel=True):
            log.warning("Ray has a place for a worker, but has not started it yet", worker=self._name)
        else:
            needs = self._group.resources
            log.warning("Ray has no place for a worker yet", worker=self._name, needs=needs)

    def _take(self, messages: list[Any]) -> None:
        for message in messages:
            if isinstance(message, Stopped):
                self._stopped = message
            self._deliver.send_nowait(message)

    def _kill_actor(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)


async def _run(wait: Callable[[], Awaitable[Any]]) -> Any:
    return await wait()


async def _connect() -> None:
    """Connect to Ray, which takes over SIGTERM in a way that ends the process: give it back."""
    if ray.is_initialized():
        return
    await trio.to_thread.run_sync(_init, abandon_on_cancel=True)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


def _init() -> None:
    ray.init(include_dashboard=False, logging_level="warning")


def _resources(spec: WorkerSpec) -> dict[str, float]:
    """Return what Ray is asked for: a GPU, unless the engine computes on CPUs or the cluster has none."""
    wants_gpu = spec.rank.device_index is not None and ray.cluster_resources().get("GPU", 0) > 0
    return {"CPU": float(spec.cpu_threads or 1), **({"GPU": 1.0} if wants_gpu else {})}


def _start_actor(spec: WorkerSpec, group: RankGroup) -> Any:
    actor_class = ray.remote(concurrency_groups={"put": 1, "get": 1})(RankActor)
    place = group.place(spec.rank.rank)
    resources = group.resources
    return actor_class.options(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        scheduling_strategy=place,
    ).remote(spec.runner)
