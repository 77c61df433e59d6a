"""Keep a number of requests in flight against a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import trio

from ullm.bench.stats import BenchRecord, RunSummary, summarise
from ullm.bench.workload import BenchRequest, Workload

OnRecord = Callable[[int, BenchRecord], None]


class BenchTarget(Protocol):
    """Something that answers requests: a server, an engine, another program."""

    @property
    def name(self) -> str:
        """The name in reports."""

    async def run(self, request: BenchRequest, record: BenchRecord) -> None:
        """Run one request to its end and fill in ``record``; failures go into ``record.error``."""


async def measure(
    target: BenchTarget,
    workload: Workload,
    concurrency: int,
    num_requests: int,
    *,
    stream: int = 0,
    seconds: float = math.inf,
) -> tuple[RunSummary, list[BenchRecord]]:
    """Run a closed loop: ``concurrency`` clients, each sending its next request when the last has ended.

    Args:
        stream: number of the workload's stream of requests; see `Workload.requests`.
        seconds: how long requests are sent, though each client sends at least one; those sent are finished.
    """
    requests = workload.requests(stream)
    records: list[BenchRecord] = []
    left = _numbers(num_requests, concurrency, trio.current_time() + seconds)
    async with trio.open_nursery() as nursery:
        for _ in range(min(concurrency, num_requests)):
            nursery.start_soon(_client, target, requests, left, records)
    return summarise(records, concurrency), records


def _numbers(count: int, least: int, deadline: float) -> Iterator[int]:
    """Iterate over the numbers of the requests to send: all, or from ``least`` on those before a deadline."""
    for number in range(count):
        if number >= least and trio.current_time() >= deadline:
            return
        yield number


async def _client(
    target: BenchTarget, requests: Iterator[BenchRequest], left: Iterator[int], records: list[BenchRecord]
) -> None:
    for _ in left:
        request = next(requests)
        record = BenchRecord(started=trio.current_time())
        records.append(record)
        await target.run(request, record)
        record.finished = trio.current_time()
