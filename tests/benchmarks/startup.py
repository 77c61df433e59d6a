"""What a start costs: seconds until the port answers, until requests are taken, until the first token.

Variants of the server's options are started in turn, several times, so that what else the machine does
meets all of them. Needs psutil.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from tests.benchmarks.compare.scenarios import first_token
from tests.benchmarks.soak.judge import MIB
from tests.benchmarks.soak.report import number, table
from tests.benchmarks.soak.sample import Taken, taken
from ullm.bench.report import machine
from ullm.client.completions import ServerTarget, first_model
from ullm.client.http import Endpoint
from ullm.testing.processes import ServerProcess, descendants, free_port, open_server, psutil_module

START_SECONDS = 240.0
ALWAYS = ("--standby-workers", "0")
"""A standby worker is prepared when the server is up, beside the first request."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One way to start the server; ``arguments`` are of ``ullm serve``."""

    name: str
    arguments: tuple[str, ...]


class Start(msgspec.Struct, frozen=True):
    """One start.

    Args:
        live, ready, first: seconds from the command to the port's first answer, to readiness, to a token.
        live_cpu, ready_cpu, first_cpu: processor seconds of the whole tree until then.
        pss: MiB of the tree after the first token.
    """

    live: float
    live_cpu: float
    ready: float
    ready_cpu: float
    first: float
    first_cpu: float
    pss: float


class Startup(msgspec.Struct, frozen=True):
    """All starts, by variant.

    Args:
        most: share by which the processor time to the first token may be above the first variant's.
    """

    when: str
    machine: dict[str, Any]
    command: list[str]
    rounds: int
    most: float
    starts: dict[str, list[Start]]

    @property
    def good(self) -> bool:
        """Whether no variant costs more than the first one, beyond the tolerance."""
        least = [min(start.first_cpu for start in starts) for starts in self.starts.values()]
        return all(value <= least[0] * (1 + self.most) for value in least)

    def json(self) -> str:
        """Everything."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    def markdown(self) -> str:
        """The least of each column over the rounds, because others on the machine only ever add."""
        heading = (
            f"{self.when[:10]}, {self.machine['cores']} cores ({self.machine['processor']}), "
            f"{self.machine['platform']}; `{' '.join(self.command)}`. Least of {self.rounds} starts in "
            "alternation, seconds: wall time, and in brackets processor time of all processes."
        )
        columns = ["port answers", "ready", "first token", "memory of the tree (PSS), MiB"]
        rows = [["", *columns], *(_row(name, starts) for name, starts in self.starts.items())]
        return f"{heading}\n\n{table(rows)}\n"


def _row(name: str, starts: Sequence[Start]) -> list[str]:
    cells = []
    for wall in ("live", "ready", "first"):
        least = (min(getattr(start, field) for start in starts) for field in (wall, f"{wall}_cpu"))
        cells.append("{:.2f} ({:.2f})".format(*least))
    return [name, *cells, number(min(start.pss for start in starts))]


def variants(contexts: Sequence[int], blocks: Sequence[int]) -> list[Variant]:
    """Every context length with every number of KV blocks; without such numbers, as the server chooses."""
    found = []
    for context in contexts:
        length = ("--context-len", str(context))
        for count in blocks or (None,):
            name = f"context {context}" + (f", {count} blocks" if count else "")
            found.append(Variant(name, length + (("--num-blocks", str(count)) if count else ())))
    return found


async def run_startup(
    model: str,
    arguments: Sequence[str],
    chosen: Sequence[Variant],
    rounds: int,
    most: float,
    logs: Path,
    say: Say,
) -> Startup:
    """Start every variant once per round, in an order that rotates.

    Args:
        arguments: of ``ullm serve``, for all variants.
        most: see `Startup`.
        logs: folder for the servers' logs.
        say: told what happens.

    Raises:
        ServerEnded: a server did not come up.
    """
    command = ["-m", "ullm", "serve", "--model", model, *ALWAYS, *arguments]
    starts: dict[str, list[Start]] = {variant.name: [] for variant in chosen}
    for turn in range(rounds):
        shift = turn % len(chosen)
        for variant in [*chosen[shift:], *chosen[:shift]]:
            found = await measure_start([sys.executable, *command, *variant.arguments], logs / "server.log")
            starts[variant.name].append(found)
            say(f"{turn + 1}: {variant.name}: {found.first:.2f} s to the first token")
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Startup(when, machine(), command, rounds, most, starts)


async def measure_start(command: Sequence[str], log: Path) -> Start:
    """Start a server, get one token from it, stop it.

    Raises:
        ServerEnded: it did not come up.
        RequestsFailed: it did not answer.
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
        tree = await trio.to_thread.run_sync(_tree, server.pid)
        await server.stop()
    return Start(live, live_cpu, ready, ready_cpu, first, tree.cpu, tree.pss / MIB)


async def _cpu(server: ServerProcess) -> float:
    return (await trio.to_thread.run_sync(_tree, server.pid)).cpu


def _tree(pid: int) -> Taken:
    processes = [psutil_module().Process(pid), *descendants(pid)]
    return sum((taken(process) for process in processes), Taken())
