"""``ullm bench front-end``: what the front end costs by itself."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.benchmarks.front_end import Load, run_front_end
from ullm.cli.interrupts import run_to_end
from ullm.cli.terminal import stderr
from ullm.errors import UsageError
from ullm.server.http.descriptors import connection_limit, raise_limit
from ullm.testing.processes import psutil_module


def front_end(load: Load, output: Path | None, log: Path, *, as_json: bool) -> int:
    """Run it, and print the table.

    Args:
        output: also write the report there; ``.md`` for Markdown, else JSON.
        log: file for what the server writes.

    Raises:
        UsageError: a load that cannot be.
    """
    check(load)
    psutil_module()
    found = run_to_end(run_front_end, load, log, lambda line: stderr().print(line, markup=False))
    if output is not None:
        text = found.markdown() if output.suffix == ".md" else found.json() + "\n"
        output.write_text(text, encoding="utf-8")
    sys.stdout.write(found.json() + "\n" if as_json else found.markdown())
    return 0


def check(load: Load) -> None:
    """Raise `UsageError` for what cannot be run, before anything is started."""
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
