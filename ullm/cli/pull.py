"""``ullm pull``: fetch a model before it is needed."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ullm.cli.terminal import fetch_model, stderr
from ullm.config import EngineConfig


def pull(config: EngineConfig) -> int:
    """Fetch or refresh the model, and print its path.

    Raises:
        ModelError: the model cannot be fetched.
    """
    model = fetch_model(config, stderr(), refresh=True)
    size = folder_size(model.path)
    Console(highlight=False, soft_wrap=True).print(
        f"{model.name}: {model.path} ({size / 1e6:,.0f} MB)", markup=False
    )
    return 0


def folder_size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; links count as their targets."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
