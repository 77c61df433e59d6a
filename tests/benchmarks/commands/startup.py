"""``ullm bench startup``: what a start costs, against context length and number of KV blocks."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.startup import run_startup, variants
from ullm.cli.interrupts import run_to_end
from ullm.cli.terminal import stderr
from ullm.errors import UsageError
from ullm.testing.processes import psutil_module


def parse_numbers(text: str, flag: str) -> list[int]:
    """``512,2048`` as numbers; none for an empty text.

    Raises:
        UsageError: not a list of whole numbers above 0.
    """
    try:
        found = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [0]
    if any(value < 1 for value in found):
        raise UsageError(f"{flag} {text}: expected numbers above 0, separated by commas, as in 512,2048")
    return found


def startup(
    model: str,
    arguments: Sequence[str],
    contexts: Sequence[int],
    blocks: Sequence[int],
    rounds: int,
    most: float,
    output: Path | None,
) -> int:
    """Start each variant so often, and show what it took; 1 if one costs more than the first.

    Args:
        output: also write the report there; .md for Markdown, else JSON.

    Raises:
        UsageError: nothing to measure.
    """
    if not contexts or rounds < 1:
        raise UsageError("--contexts needs at least one number, and --rounds must be at least 1")
    psutil_module()
    with tempfile.TemporaryDirectory(prefix="ullm-startup-") as logs:
        found = run_to_end(
            run_startup,
            model,
            arguments,
            variants(contexts, blocks),
            rounds,
            most,
            Path(logs),
            lambda line: stderr().print(line, markup=False),
        )
    if output is not None:
        output.write_text(found.markdown() if output.suffix == ".md" else found.json() + "\n", "utf-8")
    sys.stdout.write(found.markdown())
    return 0 if found.good else 1
