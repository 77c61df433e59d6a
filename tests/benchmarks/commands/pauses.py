"""``ullm bench pauses``: how long clients wait at a loss, a stop, and a sleep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.pauses import run_pauses
from ullm.cli.interrupts import run_to_end
from ullm.cli.terminal import stderr
from ullm.errors import UsageError
from ullm.testing.processes import psutil_module

SETTLE = 5.0
"""Seconds after a start or a sleep, for the standby worker."""


def pauses(model: str, arguments: Sequence[str], streams: int, rounds: int, output: Path | None) -> int:
    """Measure, and show what was found.

    Args:
        output: also write the report there; .md for Markdown, else JSON.

    Raises:
        UsageError: nothing to measure.
    """
    if streams < 1 or rounds < 1:
        raise UsageError("--streams and --rounds must be at least 1")
    psutil_module()
    command = [sys.executable, "-m", "ullm", "serve", "--model", model, "--port", "{port}", *arguments]
    found = run_to_end(
        run_pauses, command, streams, rounds, SETTLE, lambda line: stderr().print(line, markup=False)
    )
    if output is not None:
        output.write_text(found.markdown() if output.suffix == ".md" else found.json() + "\n", "utf-8")
    sys.stdout.write(found.markdown())
    return 0
