"""A long run: a server, its clients, a sample at each interval, and the verdict."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from tests.benchmarks.soak.judge import Tolerance, TooShort, ends, judge, readings
from tests.benchmarks.soak.mix import Mix, Unexpected, run_request
from tests.benchmarks.soak.sample import Sample, ServerSampler
from tests.benchmarks.soak.soak_report import SoakReport
from ullm.bench.bench_report import machine
from ullm.bench.workload import Length
from ullm.client.completions import first_model
from ullm.client.http import Connection, Endpoint
from ullm.errors import ServerRefused, ServerUnreachable
from ullm.testing.processes import POLL, at_root, free_port, open_server

START_SECONDS = 120.0
SETTLE_SECONDS = 20.0
"""Seconds after the last answer within which nothing may be in flight any more."""
PATIENCE = 5.0
"""How often the planned duration may pass until there are readings enough: a busy machine gives few."""
MOST_FAILURES = 50
"""Number of failed requests after which the run is given up."""
PROGRESS_LINES = 10
"""Number of progress lines per run."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class SoakPlan:
    """A run.

    Args:
        model: folder or name, as for ``ullm serve``.
        arguments: more options of ``ullm serve``.
        streams: number of clients that send one request after another.
        seconds, requests: minimum duration, and minimum number of answered requests.
        interval: seconds between two samples.
        warm_up: share of the run that is not judged. A server's memory grows until its prefix cache has
            filled the KV blocks, and its caches are full.
    """

    model: str
    arguments: tuple[str, ...] = ()
    streams: int = 16
    seconds: float = 1800.0
    requests: int = 0
    interval: float = 10.0
    prompt_words: Length = Length(8, 64)
    output_tokens: Length = Length(8, 64)
    seed: int = 0
    warm_up: float = 0.1
    tolerance: Tolerance = Tolerance()

    def command(self, port: int) -> list[str]:
        """Return the command that starts the server."""
        chosen = ("--model", self.model, "--port", str(port))
        return [sys.executable, "-m", "ullm", "serve", *chosen, *self.arguments]


@dataclass
class SoakLoad:
    """The clients, and what they have seen."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    stopping: trio.Event = field(default_factory=trio.Event)

    async def client(self, endpoint: Endpoint, mix: Mix, number: int) -> None:
        """Send one request after another until `stopping`, or until too many have failed."""
        connection = Connection(at_root(endpoint))
        requests = mix.requests(number)
        try:
            while not self.stopping.is_set():
                try:
                    self.counts[await run_request(connection, next(requests))] += 1
                except (Unexpected, ServerUnreachable) as error:
                    self._fail(str(error))
        finally:
            await connection.aclose()

    def _fail(self, why: str) -> None:
        self.counts["failed"] += 1
        self.failures.append(why)
        if len(self.failures) >= MOST_FAILURES:
            self.stopping.set()


async def run_soak(plan: SoakPlan, log: Path, say: Say) -> SoakReport:
    """Start the server, keep it busy, judge it, stop it.

    Args:
        log: file for the server's log.
        say: gets a line of progress now and then.

    Raises:
        ServerEnded: the server does not start.
        TooShort: there are too few readings to judge.
    """
    endpoint = Endpoint("http", "127.0.0.1", free_port(), "/v1")
    command = plan.command(endpoint.port)
    load = SoakLoad()
    async with open_server("ullm serve", command, endpoint, log) as server:
        await server.wait_answer("/ready", START_SECONDS)
        mix = Mix(await first_model(endpoint), plan.prompt_words, plan.output_tokens, plan.seed)
        sampler = ServerSampler(server)
        async with trio.open_nursery() as nursery:
            for number in range(plan.streams):
                nursery.start_soon(load.client, endpoint, mix, number)
            samples = await _watch(plan, load, sampler, say)
        complaints = load.failures[:5] + await _at_rest(sampler)
        status, _ = await server.stop()
    complaints += [] if status == 0 else [f"SIGTERM: the server's status is {status}"]
    return condense(plan, command, load.counts, samples, complaints)


async def _watch(plan: SoakPlan, load: SoakLoad, sampler: ServerSampler, say: Say) -> list[Sample]:
    """Take a sample at each interval until the run is over; then stop the clients."""
    samples: list[Sample] = []
    looks = lines_shown = 0
    try:
        while not load.stopping.is_set():
            with suppress(ServerRefused):  # no worker is up now; that one was lost will be seen
                samples.append(await sampler.take(load.counts.total()))
            looks += 1
            passed, answered = trio.current_time() - sampler.began, load.counts["answered"]
            is_enough = passed >= plan.seconds and answered >= plan.requests
            if is_enough and (_can_be_judged(plan, samples) or passed >= plan.seconds * PATIENCE):
                break
            share = min(passed / plan.seconds, answered / plan.requests if plan.requests else 1.0)
            if share * PROGRESS_LINES >= lines_shown:
                say(f"{passed:.0f} s, {load.counts.total()} requests")
                lines_shown += 1
            with trio.move_on_at(sampler.began + looks * plan.interval):
                await load.stopping.wait()
    except ServerUnreachable as error:
        load.failures.append(str(error))
    finally:
        load.stopping.set()
    return samples


def _can_be_judged(plan: SoakPlan, samples: list[Sample]) -> bool:
    try:
        ends(readings(samples), plan.warm_up)
    except TooShort:
        return False
    return True


async def _at_rest(sampler: ServerSampler) -> list[str]:
    """Wait until nothing is in flight; return complaints about what stays for too long."""
    left: dict[str, float] = {}
    try:
        with trio.move_on_after(SETTLE_SECONDS):
            while True:
                if not (left := await sampler.in_flight()):
                    break
                await trio.sleep(POLL)
    except ServerUnreachable as error:
        return [str(error)]
    return [f"{name} is {value:g} although all requests have ended" for name, value in left.items()]


def condense(
    plan: SoakPlan, command: list[str], counts: Counter[str], samples: list[Sample], complaints: list[str]
) -> SoakReport:
    """Judge the samples.

    Raises:
        TooShort
    """
    intervals = readings(samples)
    first, last = ends(intervals, plan.warm_up)
    restarts = samples[-1].restarts - samples[0].restarts
    return SoakReport(
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=machine(),
        command=command,
        streams=plan.streams,
        seconds=samples[-1].seconds,
        warm_up=plan.warm_up,
        tolerance=plan.tolerance,
        counts=dict(counts),
        compared=last[-1].requests - first[-1].requests,
        findings=judge(first, last, plan.tolerance),
        complaints=complaints + ([f"{restarts:g} workers were restarted"] if restarts else []),
        samples=samples,
        readings=intervals,
    )
