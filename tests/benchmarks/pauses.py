"""``python -m tests.benchmarks pauses``: how long clients wait after a failure, in a stop, and in a sleep.

Each event of `events` with a pause is repeated, each time with a server of its own; then one server falls
asleep and wakes up at each level. Needs psutil.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
from cyclopts import Parameter

from tests.benchmarks.compare.scenarios import first_token
from tests.benchmarks.events import EventCandidate, run_event
from tests.benchmarks.shared_options import Model, Rounds, ServerText, split_server_options, write_report
from tests.benchmarks.soak.judge import MIB
from tests.benchmarks.soak.soak_report import table
from ullm.bench.bench_report import machine
from ullm.bench.server_target import ServerTarget
from ullm.cli.interrupts import run_to_end
from ullm.cli.options import Output
from ullm.cli.terminal import stderr
from ullm.client.completions import first_model
from ullm.client.http import Connection, Endpoint
from ullm.config import DEFAULT_MODEL, MAX_SLEEP_LEVEL
from ullm.errors import UsageError
from ullm.testing.processes import free_port, open_server, psutil_module, tree_memory

START_SECONDS = 240.0
SETTLE = 5.0
"""Seconds after a start or a sleep, for the standby worker."""
GAP, DRAIN = "longest silence in a stream", "exit after the last stream"
EVENTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "undisturbed": (GAP, "undisturbed", ()),
    "worker SIGKILL": (GAP, "worker SIGKILL", ()),
    "worker SIGKILL, no standby worker": (GAP, "worker SIGKILL", ("--standby-workers", "0")),
    "worker SIGSTOP": (GAP, "worker SIGSTOP", ()),
    "SIGTERM": (DRAIN, "SIGTERM, 30 s to drain", ()),
}
"""Row of the report → kind of pause, name of the event, more options of the server."""

Say = Callable[[str], None]


class Nap(msgspec.Struct, frozen=True):
    """One sleep at a level, ended in both ways; seconds, and MiB of the whole tree (PSS).

    Args:
        asleep: time from the request to sleep to its answer.
        woken: time from the request to wake to its answer.
        first: time to the first token of a request that arrives during sleep, waking included.
        awake: time to the first token of a request that arrives awake.
    """

    asleep: float
    woken: float
    first: float
    awake: float
    memory_awake: float
    memory_asleep: float


class PausesReport(msgspec.Struct, frozen=True):
    """All measurements: event → seconds, level → naps."""

    when: str
    machine: dict[str, Any]
    command: list[str]
    streams: int
    pauses: dict[str, list[float]]
    naps: dict[int, list[Nap]]

    def json(self) -> str:
        """Return all measurements as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    def markdown(self) -> str:
        """Return two tables of medians, with the maximum in brackets."""
        heading = (
            f"{self.when[:10]}, {self.machine['cores']} cores ({self.machine['processor']}), "
            f"{self.machine['platform']}; `{' '.join(self.command[1:])}`; {self.streams} streams. "
            "Seconds: median, and in brackets the most."
        )
        events = [["", "pause", "s"]]
        events += [[name, EVENTS[name][0], _seconds(values)] for name, values in self.pauses.items()]
        columns = ["fall asleep", "wake", "first token, asleep", "first token, awake", "MiB awake", "asleep"]
        naps = [["level", *columns], *(_nap_row(level, each) for level, each in self.naps.items())]
        return "\n\n".join([heading, table(events), table(naps)]) + "\n"


def _nap_row(level: int, naps: Sequence[Nap]) -> list[str]:
    times = [[getattr(nap, name) for nap in naps] for name in ("asleep", "woken", "first", "awake")]
    memory = [
        statistics.median(getattr(nap, f"memory_{name}") for nap in naps) for name in ("awake", "asleep")
    ]
    return [str(level), *map(_seconds, times), *(f"{value:.0f}" for value in memory)]


def _seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({max(values):.2f})"


async def run_pauses(
    command: Sequence[str], streams: int, rounds: int, settle: float, say: Say
) -> PausesReport:
    """Repeat all events, in turn, and then the sleeps.

    Args:
        command: the server's command, with ``{port}``.
        settle: seconds after a start in which a server may prepare its standby worker.
        say: gets a line after each measurement.

    Raises:
        ServerEnded: a server did not come up.
    """
    pauses: dict[str, list[float]] = {name: [] for name in EVENTS}
    for turn in range(rounds):
        for name, (kind, event, options) in EVENTS.items():
            candidate = EventCandidate("ullm", [*command, *options], ["--shutdown-timeout", "{seconds}"])
            seen = (await run_event(candidate, event, streams, settle)).values
            seconds = seen["longest gap"] if kind == GAP else seen["exit after"] - seen["last stream ended"]
            pauses[name].append(seconds)
            say(f"{turn + 1}: {name}: {seconds:.2f} s")
    naps = await run_naps(command, rounds, settle, say)
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return PausesReport(when, machine(), list(command), streams, pauses, naps)


async def run_naps(command: Sequence[str], rounds: int, settle: float, say: Say) -> dict[int, list[Nap]]:
    """Put one server to sleep at each level in turn.

    Raises:
        ServerEnded: it did not come up.
        ServerRefused, RequestsFailed: it did not sleep, wake or answer.
    """
    endpoint = Endpoint("http", "127.0.0.1", free_port(), "/v1")
    naps: dict[int, list[Nap]] = {level: [] for level in range(MAX_SLEEP_LEVEL + 1)}
    with tempfile.TemporaryDirectory(prefix="ullm-") as folder:
        socket = Path(folder) / "admin"
        line = [part.replace("{port}", str(endpoint.port)) for part in command]
        line += ["--admin-listen", f"unix:{socket}"]
        async with open_server("ullm serve", line, endpoint, Path(folder) / "log") as server:
            await server.wait_answer("/ready", START_SECONDS)
            target = ServerTarget(endpoint, await first_model(endpoint))
            admin = Connection(Endpoint("unix", str(socket), 0, ""))
            try:
                await first_token(target, 0)
                await trio.sleep(settle)
                for level in list(naps) * rounds:
                    naps[level].append(await _nap(target, admin, server.pid, level, settle))
                    say(f"sleep at level {level}: awake after {naps[level][-1].woken:.2f} s")
            finally:
                await target.aclose()
                await admin.aclose()
    return naps


async def _nap(target: ServerTarget, admin: Connection, pid: int, level: int, settle: float) -> Nap:
    memory = await trio.to_thread.run_sync(tree_memory, pid) / MIB
    awake = await _first(target)
    asleep = await _timed(admin, "/sleep", {"level": level})
    memory_asleep = await trio.to_thread.run_sync(tree_memory, pid) / MIB
    woken = await _timed(admin, "/wake", None)
    await _timed(admin, "/sleep", {"level": level})
    first = await _first(target)
    await trio.sleep(settle)
    return Nap(asleep, woken, first, awake, memory, memory_asleep)


async def _first(target: ServerTarget) -> float:
    began = trio.current_time()
    return await first_token(target, 0) - began


async def _timed(admin: Connection, path: str, body: Any) -> float:
    began = trio.current_time()
    await admin.json("POST", path, body)
    return trio.current_time() - began


def pauses(
    *,
    model: Model = DEFAULT_MODEL,
    server: ServerText = "",
    streams: Annotated[int, Parameter(help="Streams in flight at each event.")] = 6,
    rounds: Rounds = 3,
    output: Output = None,
) -> int:
    """Show how long clients wait when a worker is lost, a server stops, or it sleeps."""
    if streams < 1 or rounds < 1:
        raise UsageError("--streams must be at least 1, and --rounds must be at least 1")
    psutil_module()
    options = split_server_options(server)
    command = [sys.executable, "-m", "ullm", "serve", "--model", model, "--port", "{port}", *options]
    report = run_to_end(
        run_pauses, command, streams, rounds, SETTLE, lambda line: stderr().print(line, markup=False)
    )
    write_report(report.markdown(), report.json(), output)
    sys.stdout.write(report.markdown())
    return 0
