"""Samples of a server from outside: the resources that its processes use. Needs psutil."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from ullm.client.http import Connection
from ullm.testing.processes import MeasuredServer, at_root, descendants, psutil_module

YARDSTICK_PIECES = 30
YARDSTICK_PAUSE = 0.003
"""Seconds between two pieces of the fixed work, in which others fill the caches, as between two steps."""
YARDSTICK_OBJECTS = 30_000
STEPS, TOKENS, RESTARTS = "ullm_steps_total", "ullm_generation_tokens_total", "ullm_worker_restarts_total"
IN_FLIGHT = ("ullm_num_requests_running", "ullm_num_requests_waiting", "ullm_kv_cache_usage_ratio")
_LINE = re.compile(r"^(\w+) (\S+)$", re.MULTILINE)


class ProcessUsage(msgspec.Struct, frozen=True):
    """Resources that some processes use together.

    Args:
        cpu: processor seconds since their start, user and system.
        pss: bytes, each page divided by the number of its users; as ``rss`` where that is unknown.
        rss: bytes.
        files: open descriptors.
    """

    cpu: float = 0.0
    pss: int = 0
    rss: int = 0
    files: int = 0

    def __add__(self, other: ProcessUsage) -> ProcessUsage:
        return ProcessUsage(
            self.cpu + other.cpu, self.pss + other.pss, self.rss + other.rss, self.files + other.files
        )


class Sample(msgspec.Struct, frozen=True):
    """One sample of a server.

    Args:
        seconds: since the load began.
        requests: number of requests that have ended, in whatever way.
        steps, tokens, restarts: the server's own counts.
        yardstick: processor seconds of a fixed piece of work, which show how fast the machine is now.
        standby: resources of worker processes that are not in service.
        worker_pids: pids of worker processes in service.
    """

    seconds: float
    requests: int
    steps: float
    tokens: float
    restarts: float
    yardstick: float
    front: ProcessUsage
    worker: ProcessUsage
    standby: ProcessUsage
    worker_pids: list[int]

    @property
    def pss(self) -> int:
        """Proportional set size of the whole process tree, in bytes."""
        return self.front.pss + self.worker.pss + self.standby.pss


@dataclass
class ServerSampler:
    """Takes samples of one server.

    Args:
        began: time on trio's clock that counts as 0.
    """

    server: MeasuredServer
    began: float = field(default_factory=trio.current_time)

    async def take(self, requests: int) -> Sample:
        """Take a sample.

        Args:
            requests: number of requests that have ended.

        Raises:
            ServerUnreachable, ServerRefused: the server does not answer.
        """
        metrics = await self.metrics()
        health = await self._ask("/health")
        pids = [pid for replica in msgspec.json.decode(health)["replicas"] for pid in replica["worker_pids"]]
        front, worker, standby = await trio.to_thread.run_sync(look, self.server.pid, pids)
        return Sample(
            seconds=trio.current_time() - self.began,
            requests=requests,
            steps=metrics[STEPS],
            tokens=metrics[TOKENS],
            restarts=metrics[RESTARTS],
            yardstick=await trio.to_thread.run_sync(yardstick),
            front=front,
            worker=worker,
            standby=standby,
            worker_pids=pids,
        )

    async def metrics(self) -> dict[str, float]:
        """Return the values of ``/metrics`` that have no labels."""
        return {name: float(value) for name, value in _LINE.findall((await self._ask("/metrics")).decode())}

    async def in_flight(self) -> dict[str, float]:
        """Return the metrics of work in flight that are not 0."""
        metrics = await self.metrics()
        return {name: metrics[name] for name in IN_FLIGHT if metrics[name]}

    async def _ask(self, path: str) -> bytes:
        connection = Connection(at_root(self.server.endpoint))
        try:
            async with connection.request("GET", path) as pieces:
                return b"".join([piece async for piece in pieces])
        finally:
            await connection.aclose()


def look(pid: int, worker_pids: list[int]) -> tuple[ProcessUsage, ProcessUsage, ProcessUsage]:
    """Return the resources of a server, of its workers in service, and of all its other descendants."""
    front, worker, standby = process_usage(psutil_module().Process(pid)), ProcessUsage(), ProcessUsage()
    for process in descendants(pid):
        if process.pid in worker_pids:
            worker += process_usage(process)
        else:
            standby += process_usage(process)
    return front, worker, standby


def process_usage(process: Any) -> ProcessUsage:
    """Return the resources of one process; none if it has ended."""
    try:
        with process.oneshot():
            times, memory = process.cpu_times(), process.memory_full_info()
            files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
    except psutil_module().Error:
        return ProcessUsage()
    return ProcessUsage(times.user + times.system, getattr(memory, "pss", memory.rss), memory.rss, files)


def tree_usage(pid: int) -> ProcessUsage:
    """Return the resources of a process and all its descendants together."""
    processes = [psutil_module().Process(pid), *descendants(pid)]
    return sum((process_usage(process) for process in processes), ProcessUsage())


def yardstick() -> float:
    """Return the processor seconds of a fixed piece of work of some milliseconds, done in pieces with pauses.

    On a shared machine the same work costs more processor time while others are busy, because they share
    caches, memory and clock limits. A cost that grows no more than this one has not grown.
    """
    objects = {number * 7919 % YARDSTICK_OBJECTS: str(number) for number in range(YARDSTICK_OBJECTS)}
    spent = 0.0
    for piece in range(YARDSTICK_PIECES):
        time.sleep(YARDSTICK_PAUSE)
        began = time.thread_time()
        sum(len(objects[number]) for number in range(piece, YARDSTICK_OBJECTS, YARDSTICK_PIECES))
        spent += time.thread_time() - began
    return spent
