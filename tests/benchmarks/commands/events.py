"""``ullm bench events``: what clients get when a server is stopped, or loses its worker."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.events import PROGRAM, START_UP, Candidate, Found, run_event, run_start_up
from ullm.cli.interrupts import run_to_end
from ullm.cli.terminal import stderr
from ullm.errors import UsageError

OWN = Candidate(
    "ullm", [sys.executable, "-m", "ullm", "serve", "--port", "{port}"], ["--shutdown-timeout", "{seconds}"]
)


def parse_candidate(text: str) -> Candidate:
    """``NAME=COMMAND``, with ``{port}`` in it; what comes after `` -- `` are options to drain.

    Raises:
        UsageError: not such a text.
    """
    name, equals, line = text.partition("=")
    command, _, drain = line.partition(" -- ")
    if not equals or not name or "{port}" not in command:
        raise UsageError(f"--server {text!r}: expected NAME=COMMAND with {{port}} in it")
    return Candidate(name, shlex.split(command), shlex.split(drain))


def events(
    servers: Sequence[str], only: Sequence[str], streams: int, start_up: float, output: Path | None
) -> int:
    """Put each server through the program, and show what came of it.

    Args:
        servers: as `parse_candidate` reads them; none: this ullm.
        only: events to run; none: all.
        start_up: seconds into the start at which it gets SIGTERM.

    Raises:
        UsageError: no such event or server.
    """
    candidates = [parse_candidate(text) for text in servers] or [OWN]
    names = [*PROGRAM, START_UP]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UsageError(f"--only {unknown[0]!r}: the events are {', '.join(map(repr, names))}")
    found = run_to_end(run_all, candidates, only or names, streams, start_up)
    if output is not None:
        listed = {name: [{"event": one.event, **one.values} for one in each] for name, each in found.items()}
        output.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    Console().print(as_table(found))
    return 0


async def run_all(
    candidates: Sequence[Candidate], names: Sequence[str], streams: int, start_up: float
) -> dict[str, list[Found]]:
    """One server after the other, one event after the other."""
    found: dict[str, list[Found]] = {}
    for candidate in candidates:
        for name in names:
            stderr().print(f"{candidate.name}: {name}", markup=False)
            if name == START_UP:
                one = await run_start_up(candidate, start_up)
            else:
                one = await run_event(candidate, name, streams)
            found.setdefault(candidate.name, []).append(one)
    return found


def as_table(found: dict[str, list[Found]]) -> Table:
    """Events down, servers across."""
    table = Table("event", *found, show_lines=True)
    for rows in zip(*found.values(), strict=True):
        cells = ["\n".join(f"{key}: {value}" for key, value in row.values.items()) for row in rows]
        table.add_row(rows[0].event, *cells)
    return table
