"""``ullm doctor --calibrate``: measure the ways to divide products for a model, and show the table."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Column, Table

from ullm.cli.terminal import fetch_model, stderr
from ullm.config import EngineConfig
from ullm.errors import ConfigError
from ullm.system.interpreter import python_command, python_environment

TIMEOUT = 120.0
"""Seconds: 3 for the measurements, the rest for importing torch and compiling the kernels."""


def calibrate(config: EngineConfig, *, as_json: bool) -> int:
    """Measure in a process of its own, keep the choice for later starts, and print the table.

    Raises:
        ModelError: the model cannot be found.
        ConfigError: the kernels do not compute it here, or could not be measured.
    """
    model = fetch_model(config, stderr(), refresh=False)
    command = python_command("-m", "ullm.model.calibrate")
    message = msgspec.json.encode((config, str(model.path)))
    try:
        done = subprocess.run(
            command,
            input=message,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
            env=python_environment(),
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"calibration took more than {TIMEOUT:g} s; try it on an idle machine") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ConfigError(lines[-1] if lines else f"calibration ended with status {done.returncode}")
    report = msgspec.json.decode(done.stdout)
    if as_json:
        sys.stdout.write(msgspec.json.format(done.stdout, indent=2).decode() + "\n")
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
