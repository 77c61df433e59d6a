"""The load on a disturbed server, and what is measured of it: answers, probes and processor time."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from tests.benchmarks.compare.scenarios import (
    ComparisonLoad,
    Figures,
    Metric,
    RequestsFailed,
    decode_metric,
    decode_workload,
    median_first,
    require_answers,
    warm_up,
)
from tests.benchmarks.soak.sample import tree_usage
from ullm.bench.load import BenchTarget, measure
from ullm.bench.stats import RunSummary, percentile
from ullm.client.http import Endpoint
from ullm.testing.processes import answers, psutil_module

PROBE_PATH = "/health"
PROBE_PERIOD = 0.1
MOST_REQUESTS = 1_000_000
QUIET_SECONDS, QUIET_SHARE = 2.0, 0.05
"""A server is quiet if it uses less than this share of a core for so long."""
QUIET_LIMIT = 60.0
TICK = 0.01
"""Least processor seconds that are seen."""


class Spent(NamedTuple):
    """Processor seconds that a server, and everybody else, has used; see `LevelMetrics`."""

    server: float
    others: float


Account = Callable[[], Awaitable[Spent]]


@dataclass(frozen=True)
class LevelMetrics:
    """The metrics of a number of streams.

    Args:
        seconds: processor seconds that the server's processes used.
        processors: the same, per second.
        efficiency: generated tokens per processor second.
        others: processors that everybody else used: other programs, and other virtual machines.
    """

    rate: Metric
    first: Metric
    probe: Metric
    probe_p99: Metric
    seconds: Metric
    processors: Metric
    efficiency: Metric
    others: Metric

    @classmethod
    def of(cls, level: int) -> LevelMetrics:
        """Return the metrics of ``level`` streams."""
        rate = decode_metric(level)
        return cls(
            rate,
            Metric(f"{rate.name}: time to first token", "ms", "lower"),
            Metric(f"{rate.name}: {PROBE_PATH}, median", "ms", "lower"),
            Metric(f"{rate.name}: {PROBE_PATH}, p99", "ms", "lower"),
            Metric(f"{rate.name}: processor time", "s", "lower"),
            Metric(f"{rate.name}: processors", "processors"),
            Metric(f"{rate.name}: tokens per processor second", "tokens"),
            Metric(f"{rate.name}: processors of others", "processors", "lower"),
        )

    def figures(self, summary: RunSummary, spent: Spent, probes: list[float]) -> dict[Metric, float]:
        """Return the figures of one run.

        Args:
            probes: seconds that each probe took.
        """
        ordered, seconds = sorted(probes), max(spent.server, TICK)
        return {
            self.rate: summary.tokens_per_second,
            self.first: median_first(summary),
            self.probe: percentile(ordered, 0.5) * 1000,
            self.probe_p99: percentile(ordered, 0.99) * 1000,
            self.seconds: seconds,
            self.processors: seconds / summary.seconds,
            self.efficiency: summary.output_tokens / seconds,
            self.others: max(0.0, spent.others) / summary.seconds,
        }


@dataclass(frozen=True)
class DisturbanceLoad(ComparisonLoad):
    """The requests of the decode scenario.

    Args:
        seconds: how long requests are sent for each number of streams. How many a disturbed server answers
            meanwhile differs by a hundred times.
    """

    output_tokens: int = 32
    seconds: float = 8.0


@dataclass
class Prober:
    """Asks for a server's health, each time on a new connection, as an orchestrator's probes do.

    Args:
        ask: returns whether the server answered with 200.
        times: seconds that the answers took.
        failed: number of probes without an answer, or with an error status.
    """

    ask: Callable[[], Awaitable[bool]]
    times: list[float] = field(default_factory=list)
    failed: int = 0
    enough: trio.Event = field(default_factory=trio.Event)

    async def run(self) -> None:
        """Probe until there is enough; the last probe is awaited."""
        while not self.enough.is_set():
            began = trio.current_time()
            good = await self.ask()
            self.times.append(trio.current_time() - began)
            self.failed += not good
            with trio.move_on_at(began + PROBE_PERIOD):
                await self.enough.wait()


async def run_levels(target: BenchTarget, endpoint: Endpoint, pid: int, load: DisturbanceLoad) -> Figures:
    """Warm up, then measure each number of streams.

    Args:
        pid: the server's process.

    Raises:
        RequestsFailed: a request or a probe failed.
    """

    async def account() -> Spent:
        return await trio.to_thread.run_sync(look, pid)

    async def ask() -> bool:
        return await answers(endpoint, PROBE_PATH)

    await warm_up(target, load.seed)
    figures = Figures({}, {})
    for level in load.levels:
        figures.values |= await run_level(target, load, level, account, Prober(ask))
    return figures


async def run_level(
    target: BenchTarget, load: DisturbanceLoad, level: int, account: Account, prober: Prober
) -> dict[Metric, float]:
    """Measure one number of streams.

    Raises:
        RequestsFailed: a request or a probe failed.
    """
    before = await account()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(prober.run)
        summary, _ = await measure(
            target, decode_workload(load), level, MOST_REQUESTS, stream=level, seconds=load.seconds
        )
        after = await account()
        prober.enough.set()
    require_answers(summary)
    if prober.failed:
        raise RequestsFailed([f"{prober.failed} of {len(prober.times)} probes of {PROBE_PATH}"])
    spent = Spent(after.server - before.server, after.others - before.others)
    return LevelMetrics.of(level).figures(summary, spent, prober.times)


def look(pid: int) -> Spent:
    """Return what a server and its descendants have used, and all that are not this process's descendants."""
    times = psutil_module().cpu_times()._asdict()
    unused = {"idle", "iowait", "guest", "guest_nice"}  # the latter two are part of user and nice
    used = sum(seconds for name, seconds in times.items() if name not in unused)
    return Spent(tree_usage(pid).cpu, used - tree_usage(os.getpid()).cpu)


async def wait_until_quiet(seconds: Callable[[], Awaitable[float]]) -> None:
    """Wait until a server does nothing, such as preparing a standby worker; but not for ever.

    Args:
        seconds: returns the processor seconds that it has used.
    """
    with trio.move_on_after(QUIET_LIMIT):
        used = await seconds()
        while True:
            await trio.sleep(QUIET_SECONDS)
            before, used = used, await seconds()
            if used - before < QUIET_SECONDS * QUIET_SHARE:
                return
