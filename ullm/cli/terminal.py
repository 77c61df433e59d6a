"""Output for people that the commands share: messages on stderr, progress of downloads."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from ullm import hub
from ullm.config import EngineConfig
from ullm.hub import LocalModel
from ullm.logs import get_logger

log = get_logger(__name__)


def announce(line: str) -> None:
    """Write a line to stdout for whoever waits for it; where it cannot be written, one warning says so."""
    try:
        if sys.stdout is None:  # the descriptor was closed when Python started
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.write(line)
        sys.stdout.flush()
    except OSError as error:
        log.warning("stdout takes no output", cause=error.strerror, lost=line.strip())
        discard_output()


def discard_output() -> None:
    """Send what is written to stdout to the null device, so that Python has no complaint at exit either."""
    if sys.stdout is not None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def stderr() -> Console:
    """Return the console for everything that is not the answer, so that pipes carry answers only."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(console: Console) -> Iterator[hub.Progress]:
    """Yield a progress function with one bar per label; without a terminal it prints one line per label."""
    if not console.is_terminal:
        yield _plain(console)
        return
    from rich.progress import (  # takes long to import, and is rarely needed
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as progress:
        tasks = {}

        def report(label: str, done: int, total: int | None) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=None)
            # A heartbeat without a total must not reset the bar.
            if total is not None:
                progress.update(tasks[label], completed=done, total=total)

        yield report


def _plain(console: Console) -> hub.Progress:
    seen: set[str] = set()

    def report(label: str, done: int, total: int | None) -> None:
        if label not in seen:
            seen.add(label)
            console.print(f"{label} …", markup=False)

    return report


def fetch_model(config: EngineConfig, console: Console, *, refresh: bool = False) -> LocalModel:
    """Call `hub.resolve`, with progress on the terminal.

    Raises:
        ModelError: as `hub.resolve`.
    """
    with progress_bar(console) as report:
        return hub.resolve(config, report, refresh=refresh)
