"""``ullm pull``: fetch a model before it is needed."""

from __future__ import annotations

import sys
from pathlib import Path

from ullm.cli.describe import describe, show
from ullm.cli.terminal import fetch_model, stderr
from ullm.config import EngineConfig
from ullm.errors import ConfigError


def pull(config: EngineConfig) -> int:
    """Fetch or refresh the model; print its path on stdout, and on stderr its size and whether it runs here.

    Raises:
        ModelError: the model cannot be fetched.
    """
    console = stderr()
    model = fetch_model(config, console, refresh=True)
    console.print(f"{model.name}: {folder_size(model.path) / 1e6:,.0f} MB", markup=False)
    try:
        show(describe(config, str(model.path), compare=False), model.name, console)
    except ConfigError as error:  # it is fetched all the same
        console.print(str(error), markup=False)
    sys.stdout.write(f"{model.path}\n")
    return 0


def folder_size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; links count as their targets."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
