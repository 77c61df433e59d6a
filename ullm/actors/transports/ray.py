"""A worker as a Ray actor, on a machine where Ray finds the resources for it.

Needs the package ``ray``. The worker loop runs in a thread of the actor; one of its methods takes messages,
another one waits for answers. An actor sees only the GPU that Ray has assigned to it. Ray itself forwards
the worker's prints.
"""

from __future__ import annotations

import importlib
import math
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from ullm.actors.transports.base import StopReport, Transport, WorkerSpec
from ullm.errors import WorkerLost
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.protocol.messages import FromWorker, Progress, Start, Stop, Stopped, ToWorker
from ullm.worker.loop import IMPORT_BUDGET, Inbox, failed, load_runner, run_worker

ray: Any = importlib.import_module("ray")

log = get_logger(__name__)


class RankActor:
    """The Ray actor. Each method has a thread of its own, so calls of one method run in order."""

    def __init__(self, runner: str) -> None:
        self._inbox: Inbox = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[FromWorker | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(runner,), daemon=True).start()

    @ray.method(concurrency_group="put")  # type: ignore[untyped-decorator]  # Ray has no types here
    def put(self, message: ToWorker) -> None:
        """Queue a message for the worker."""
        if isinstance(message, Start) and message.rank.device_index is not None:
            rank = msgspec.structs.replace(message.rank, device_index=0)  # the only one that Ray shows
            message = msgspec.structs.replace(message, rank=rank)
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


@asynccontextmanager
async def open_ray(spec: WorkerSpec) -> AsyncIterator[Transport]:
    """Start a worker as a Ray actor; leaving the context kills it.

    Joins the cluster that RAY_ADDRESS names or that runs here, or else starts one on this machine.
    """
    actor = await trio.to_thread.run_sync(_start_actor, spec)
    transport = RayTransport(spec.rank.name, actor)
    try:
        yield transport
    finally:
        await transport.leave()


class RayTransport:
    """See `Transport`."""

    def __init__(self, name: str, actor: Any) -> None:
        self._name = name
        self._actor = actor
        self._trio = trio.lowlevel.current_trio_token()
        self._deliver, self._delivered = trio.open_memory_channel[FromWorker](math.inf)
        self._ended = trio.Event()
        self._killed = False
        self._cause = "ended"
        self._stopped: Stopped | None = None
        threading.Thread(target=self._pump, name=f"ray {name}", daemon=True).start()

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
        await trio.lowlevel.checkpoint()
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
            ray.kill(self._actor, no_restart=True)

    async def stop(self, budget: float) -> StopReport:
        """Send `Stop`, and kill the actor after nine tenths of the budget."""
        began = trio.current_time()
        was_alive = self.alive()
        if was_alive:
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
        ray.kill(self._actor, no_restart=True)
        with trio.move_on_after(stop_budget.RAY_LEAVE, shield=True):
            await self._ended.wait()

    def _pump(self) -> None:
        """Forward the actor's messages to trio; in a thread of its own, because Ray's calls block."""
        try:
            while (messages := ray.get(self._actor.get.remote()))[-1] is not None:
                self._to_trio(self._take, messages)
            self._to_trio(self._take, messages[:-1])
            self._to_trio(self._end, None)
        except ray.exceptions.RayError as error:
            self._to_trio(self._end, f"was lost by Ray: {(str(error).splitlines() or [''])[0]}")

    def _to_trio(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._trio.run_sync_soon(callback, *arguments)
        except trio.RunFinishedError:
            log.debug("trio ended before its Ray worker", worker=self._name)

    def _take(self, messages: list[FromWorker]) -> None:
        for message in messages:
            if isinstance(message, Stopped):
                self._stopped = message
            self._deliver.send_nowait(message)

    def _end(self, cause: str | None) -> None:
        if cause is not None and not self._killed:
            self._cause = cause
        self._ended.set()
        self._deliver.close()


def _start_actor(spec: WorkerSpec) -> Any:
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level="warning")
    actor_class = ray.remote(concurrency_groups={"put": 1, "get": 1})(RankActor)
    gpus = 0 if spec.rank.device_index is None else 1
    return actor_class.options(num_cpus=spec.cpu_threads or 1, num_gpus=gpus).remote(spec.runner)
