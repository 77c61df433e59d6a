"""``ullm doctor --calibrate``: measure the ways to divide products for a model, and show the table."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Column, Table

from ullm.cli.child import ask_child
from ullm.cli.terminal import fetch_model, stderr
from ullm.config import EngineConfig

TIMEOUT = 120.0
"""Seconds: 3 for the measurements, the rest for importing torch and compiling the kernels."""


def calibrate(config: EngineConfig, *, as_json: bool) -> int:
    """Measure in a process of its own, keep the choice for later starts, and print the table.

    Raises:
        ModelError: the model cannot be found.
        ResourceUnavailable: the kernels do not compute it here, or could not be measured.
    """
    model = fetch_model(config, stderr(), refresh=False)
    message = msgspec.json.encode((config, str(model.path)))
    answer = ask_child(
        "ullm.model.calibrate", message, TIMEOUT, task="calibration", advice="try it on an idle machine"
    )
    report = msgspec.json.decode(answer)
    if as_json:
        sys.stdout.write(msgspec.json.format(answer, indent=2).decode() + "\n")
    else:
        _show(report, Console(highlight=False))
    return 0


def _show(report: dict[str, Any], console: Console) -> None:
    timings = [timing for timing in report["timings"] if timing["seconds"]]
    names = timings[0]["seconds"] if timings else ()
    table = Table(
        *(Column(name, no_wrap=False, overflow="fold") for name in ("rows", *names)),
        box=None,
        padding=(0, 2, 0, 0),
    )
    for timing in timings:
        milliseconds = (f"{1000 * seconds:.2f} ms" for seconds in timing["seconds"].values())
        table.add_row(str(timing["rows"]), *milliseconds)
    console.print(table)
    tuning = report["tuning"]
    picked = ", ".join(f"{name}={tuning[name]}" for name in ("chunk_tiles", "piece", "prefetch"))
    console.print(f"picked {picked}; later starts use it, from {report['path']}", soft_wrap=True)
