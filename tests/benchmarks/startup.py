"""``python -m tests.benchmarks startup``: the cost of a start, up to the first token.

Variants of the server's options are started in turn, several times, so that other work on the machine affects
all of them alike. Needs psutil.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
from cyclopts import Parameter

from tests.benchmarks.compare.scenarios import first_token
from tests.benchmarks.shared_options import (
    Model,
    ServerText,
    parse_numbers,
    split_server_options,
    write_report,
)
from tests.benchmarks.soak.judge import MIB
from tests.benchmarks.soak.sample import tree_usage
from tests.benchmarks.soak.soak_report import number, table
from ullm.bench.bench_report import machine
from ullm.bench.server_target import ServerTarget
from ullm.cli.interrupts import run_to_end
from ullm.cli.options import Output, split_commas
from ullm.cli.terminal import stderr
from ullm.client.completions import first_model
from ullm.client.http import Endpoint
from ullm.config import DEFAULT_MODEL
from ullm.errors import UsageError
from ullm.testing.processes import MeasuredServer, free_port, open_server, psutil_module

START_SECONDS = 240.0
CONTEXTS = (512, 2048, 8192)
ALWAYS = ("--standby-workers", "0")
"""No standby worker, because it would be prepared beside the first request."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class StartVariant:
    """One way to start the server; ``arguments`` are options of ``ullm serve``."""

    name: str
    arguments: tuple[str, ...]


class ServerStart(msgspec.Struct, frozen=True):
    """One start.

    Args:
        live, ready, first: seconds from the command to the first answer, to readiness, to the first token.
        live_cpu, ready_cpu, first_cpu: processor seconds of the whole process tree until then.
        pss: MiB of the process tree after the first token.
    """

    live: float
    live_cpu: float
    ready: float
    ready_cpu: float
    first: float
    first_cpu: float
    pss: float


class StartupReport(msgspec.Struct, frozen=True):
    """All starts, by variant.

    Args:
        most: share by which the processor time to the first token may exceed the first variant's.
    """

    when: str
    machine: dict[str, Any]
    command: list[str]
    rounds: int
    most: float
    starts: dict[str, list[ServerStart]]

    @property
    def good(self) -> bool:
        """True if no variant costs more than the first one, beyond the tolerance."""
        least = [min(start.first_cpu for start in starts) for starts in self.starts.values()]
        return all(value <= least[0] * (1 + self.most) for value in least)

    def json(self) -> str:
        """Return all starts as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    def markdown(self) -> str:
        """Return a table of the minimum over the rounds, because other work on the machine only adds."""
        heading = (
            f"{self.when[:10]}, {self.machine['cores']} cores ({self.machine['processor']}), "
            f"{self.machine['platform']}; `{' '.join(self.command)}`. Least of {self.rounds} starts in "
            "alternation, seconds: wall time, and in brackets processor time of all processes."
        )
        columns = ["port answers", "ready", "first token", "memory of the tree (PSS), MiB"]
        rows = [["", *columns], *(_row(name, starts) for name, starts in self.starts.items())]
        return f"{heading}\n\n{table(rows)}\n"


def _row(name: str, starts: Sequence[ServerStart]) -> list[str]:
    cells = []
    for wall in ("live", "ready", "first"):
        least = (min(getattr(start, field) for start in starts) for field in (wall, f"{wall}_cpu"))
        cells.append("{:.2f} ({:.2f})".format(*least))
    return [name, *cells, number(min(start.pss for start in starts))]


def variants(contexts: Sequence[int], blocks: Sequence[int]) -> list[StartVariant]:
    """Return a variant for each context length and number of KV blocks, which the server chooses if empty."""
    combinations = []
    for context in contexts:
        length = ("--context-len", str(context))
        for count in blocks or (None,):
            name = f"context {context}" + (f", {count} blocks" if count else "")
            combinations.append(StartVariant(name, length + (("--num-blocks", str(count)) if count else ())))
    return combinations


@dataclass(frozen=True)
class StartupPlan:
    """What is started.

    Args:
        arguments: options of ``ullm serve`` for all variants.
        most: see `StartupReport`.
        logs: folder for the servers' logs.
    """

    model: str
    arguments: Sequence[str]
    variants: Sequence[StartVariant]
    rounds: int
    most: float
    logs: Path


async def run_startup(plan: StartupPlan, say: Say) -> StartupReport:
    """Start every variant once per round, in an order that rotates.

    Args:
        say: gets a line after each start.

    Raises:
        ServerEnded: a server did not come up.
    """
    command = ["-m", "ullm", "serve", "--model", plan.model, *ALWAYS, *plan.arguments]
    starts: dict[str, list[ServerStart]] = {variant.name: [] for variant in plan.variants}
    for turn in range(plan.rounds):
        shift = turn % len(plan.variants)
        for variant in [*plan.variants[shift:], *plan.variants[:shift]]:
            arguments = [sys.executable, *command, *variant.arguments]
            start = await measure_start(arguments, plan.logs / "server.log")
            starts[variant.name].append(start)
            say(f"{turn + 1}: {variant.name}: {start.first:.2f} s to the first token")
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return StartupReport(when, machine(), command, plan.rounds, plan.most, starts)


async def measure_start(command: Sequence[str], log: Path) -> ServerStart:
    """Start a server, get one token from it, stop it.

    Raises:
        ServerEnded: the server did not come up.
        RequestsFailed: the server did not answer.
    """
    port = free_port()
    endpoint = Endpoint("http", "127.0.0.1", port, "/v1")
    async with open_server("ullm serve", [*command, "--port", str(port)], endpoint, log) as server:
        live = await server.wait_answer("/live", START_SECONDS, any_status=True)
        live_cpu = await _cpu(server)
        ready = await server.wait_answer("/ready", START_SECONDS)
        ready_cpu = await _cpu(server)
        target = ServerTarget(endpoint, await first_model(endpoint))
        try:
            first = await first_token(target, 0) - server.started
        finally:
            await target.aclose()
        tree = await trio.to_thread.run_sync(tree_usage, server.pid)
        await server.stop()
    return ServerStart(live, live_cpu, ready, ready_cpu, first, tree.cpu, tree.pss / MIB)


async def _cpu(server: MeasuredServer) -> float:
    return (await trio.to_thread.run_sync(tree_usage, server.pid)).cpu


def startup(
    *,
    model: Model = DEFAULT_MODEL,
    server: ServerText = "",
    contexts: Annotated[
        list[str] | None, Parameter(help="Context lengths. Default: 512,2048,8192.", negative="")
    ] = None,
    blocks: Annotated[
        list[str] | None, Parameter(help="Numbers of KV blocks; default: as the server chooses.", negative="")
    ] = None,
    rounds: Annotated[int, Parameter(help="Number of starts of each variant.")] = 5,
    max_growth: Annotated[
        float,
        Parameter(help="Tolerated processor time to the first token above the first variant's, as a share."),
    ] = 0.1,
    output: Output = None,
) -> int:
    """Measure starts of servers that differ in context length or KV blocks; 1 if one costs too much."""
    lengths = parse_numbers(split_commas(contexts), "--contexts") or list(CONTEXTS)
    chosen = variants(lengths, parse_numbers(split_commas(blocks), "--blocks"))
    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {rounds}")
    psutil_module()
    with tempfile.TemporaryDirectory(prefix="ullm-startup-") as logs:
        plan = StartupPlan(model, split_server_options(server), chosen, rounds, max_growth, Path(logs))
        report = run_to_end(run_startup, plan, lambda line: stderr().print(line, markup=False))
    write_report(report.markdown(), report.json(), output)
    sys.stdout.write(report.markdown())
    return 0 if report.good else 1
