"""``python -m tests.benchmarks front-end``: the front end alone, with a model whose steps only take time.

The server, its worker and the reading crowd share the machine's cores, so that the figure that counts most is
the server's processor time per token. Needs psutil.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
from cyclopts import Parameter

from tests.benchmarks.crowd import CrowdResult, listen
from tests.benchmarks.shared_options import ServerText, StepMilliseconds, split_server_options, write_report
from ullm.bench.bench_report import machine
from ullm.bench.stats import percentile
from ullm.cli.interrupts import run_to_end
from ullm.cli.options import Json, Output
from ullm.cli.terminal import stderr
from ullm.client.completions import first_model
from ullm.client.http import Endpoint
from ullm.errors import UsageError
from ullm.server.http.descriptors import connection_limit, raise_limit
from ullm.testing import write_scripted_model
from ullm.testing.processes import MeasuredServer, free_port, open_server, psutil_module

START_SECONDS = 60.0
MICRO = 1e6
MIB = 1 << 20
COLUMNS = (
    "round",
    "tok/s",
    "front end, µs/token",
    "worker, µs/token",
    "tokens/event",
    "first p50, ms",
    "first max, ms",
    "gap p50, ms",
    "gap p99, ms",
    "gap max, ms",
    "RSS, MiB",
)


@dataclass(frozen=True)
class CrowdLoad:
    """The load on the server.

    Args:
        step_seconds: duration of the model's steps; with one token per stream and step, at most
            ``streams / step_seconds`` tokens per second are possible.
        arguments: more options of ``ullm serve``.
    """

    streams: int = 1000
    tokens: int = 128
    step_seconds: float = 0.04
    rounds: int = 3
    arguments: tuple[str, ...] = ()

    def command(self, model: Path, port: int) -> list[str]:
        """Return the command that starts the server."""
        chosen = ("--model", str(model), "--port", str(port), "--load-format", "dummy")
        runner = ("--runner", "ullm.testing:ScriptedRunner", "--standby-workers", "0")
        budget = ("--max-num-batched-tokens", str(max(2048, 2 * self.streams)))
        batch = ("--max-bs", str(self.streams), *budget)
        return [sys.executable, "-m", "ullm", "serve", *chosen, *runner, *batch, *self.arguments]


class CrowdRound(msgspec.Struct, frozen=True):
    """One crowd's run; times in seconds, processor time including the system's.

    Args:
        front, worker: processor time of the server process, and of its workers.
        first, gap: p50, p99 and maximum.
        rss: resident bytes of the server process afterwards.
    """

    seconds: float
    tokens: int
    events: int
    front: float
    worker: float
    first: tuple[float, float, float]
    gap: tuple[float, float, float]
    rss: int

    def cells(self, number: int) -> list[str]:
        """Return the cells of `COLUMNS`."""
        costs = [seconds * MICRO / self.tokens for seconds in (self.front, self.worker)]
        times = [self.first[0], self.first[2], *self.gap]
        shown = [f"{self.tokens / self.seconds:.0f}", *(f"{cost:.1f}" for cost in costs)]
        shown += [f"{self.tokens / self.events:.1f}", *(f"{seconds * 1000:.0f}" for seconds in times)]
        return [str(number), *shown, f"{self.rss / MIB:.0f}"]


class FrontEndReport(msgspec.Struct, frozen=True):
    """A finished benchmark."""

    when: str
    machine: dict[str, Any]
    streams: int
    tokens: int
    step_seconds: float
    arguments: tuple[str, ...]
    rounds: list[CrowdRound]

    def json(self) -> str:
        """Return indented JSON, times in seconds."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def markdown(self) -> str:
        """Return the load and a table of the rounds."""
        heading = (
            f"{self.streams} streams of {self.tokens} tokens, steps of {self.step_seconds * 1000:g} ms\n\n"
        )
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " ---: |" * len(COLUMNS)]
        lines += ["| " + " | ".join(run.cells(number)) + " |" for number, run in enumerate(self.rounds, 1)]
        return heading + "\n".join(lines) + "\n"


async def run_front_end(load: CrowdLoad, log: Path, say: Callable[[str], None]) -> FrontEndReport:
    """Start a server, read from it with one crowd per round, stop it.

    Args:
        log: file for the server's log.
        say: gets a line after each round.

    Raises:
        ServerEnded, StreamBroken, ServerUnreachable
    """
    endpoint = Endpoint("http", "127.0.0.1", free_port(), "/v1")
    rounds: list[CrowdRound] = []
    with tempfile.TemporaryDirectory(prefix="ullm-front-end-") as folder:
        blocks = 1 + load.streams * (load.tokens // 16 + 3)
        model = write_scripted_model(
            Path(folder) / "model", step_seconds=load.step_seconds, num_blocks=blocks
        )
        async with open_server("ullm serve", load.command(model, endpoint.port), endpoint, log) as server:
            await server.wait_answer("/ready", START_SECONDS)
            name = await first_model(endpoint)
            for _ in range(load.rounds):
                rounds.append(await _run(server, name, load))
                say(f"{rounds[-1].tokens / rounds[-1].seconds:.0f} tok/s")
            await server.stop()
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    load_fields = (load.streams, load.tokens, load.step_seconds, load.arguments)
    return FrontEndReport(when, machine(), *load_fields, rounds)


async def _run(server: MeasuredServer, model: str, load: CrowdLoad) -> CrowdRound:
    front = psutil_module().Process(server.pid)
    workers = front.children(recursive=True)
    before = _processor_time([front]), _processor_time(workers)
    where = server.endpoint.host, server.endpoint.port
    result = await trio.to_thread.run_sync(partial(listen, *where, model, load.streams, load.tokens))
    spent = _processor_time([front]) - before[0], _processor_time(workers) - before[1]
    return _round(result, *spent, front.memory_info().rss)


def _round(result: CrowdResult, front: float, worker: float, rss: int) -> CrowdRound:
    first, gap = _spread(result.first), _spread(result.gaps)
    return CrowdRound(result.seconds, result.tokens, result.events, front, worker, first, gap, rss)


def _spread(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return percentile(ordered, 0.5), percentile(ordered, 0.99), ordered[-1]


def _processor_time(processes: list[Any]) -> float:
    return float(sum(times.user + times.system for times in (each.cpu_times() for each in processes)))


def front_end(
    *,
    streams: Annotated[int, Parameter(help="Number of streams, all at once.")] = 1000,
    output_tokens: Annotated[int, Parameter(help="Tokens to generate per stream.")] = 128,
    step_ms: StepMilliseconds = 40.0,
    rounds: Annotated[int, Parameter(help="Number of runs, all with one server.")] = 3,
    server: ServerText = "",
    json: Json = False,
    output: Output = None,
    log: Annotated[Path, Parameter(help="File for the server's log.")] = Path("front-end.log"),
) -> int:
    """Measure the front end alone: many streams of a model that only takes time."""
    load = CrowdLoad(streams, output_tokens, step_ms / 1000, rounds, split_server_options(server))
    check(load)
    psutil_module()
    report = run_to_end(run_front_end, load, log, lambda line: stderr().print(line, markup=False))
    write_report(report.markdown(), report.json(), output)
    sys.stdout.write(report.json() + "\n" if json else report.markdown())
    return 0


def check(load: CrowdLoad) -> None:
    """Raise `UsageError` for a load that cannot be run, before anything is started."""
    for flag, value in (
        ("--streams", load.streams),
        ("--output-tokens", load.tokens),
        ("--rounds", load.rounds),
    ):
        if value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}")
    if load.step_seconds < 0:
        raise UsageError(f"--step-ms must be at least 0, got {load.step_seconds * 1000:g}")
    raise_limit()
    if load.streams > connection_limit():
        raise UsageError(
            f"--streams {load.streams}: only {connection_limit()} connections can be open; raise ulimit -n"
        )
