"""Several processes that run tests (pytest-xdist), and what keeps their tests from disturbing each other.

Most end-to-end tests wait rather than compute, so there are more workers than cores. The tests of one file
stay in one worker, because they share servers; those of the real model all stay in one, because they share
it. A test with the marker ``timing`` has the machine for itself, as far as other tests go.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PER_CORE, MOST = 2, 8
"""Workers for each core, and most in all."""

REAL_MODEL = re.compile(r"/test_(?:openai|parity|perplexity|readme|real_model|worker_memory)\.py$")
"""Files whose tests need the real model."""


def choose_number(config: pytest.Config) -> None:
    """Set pytest-xdist's number of workers, unless the command line does, or wants one process.

    Single files run in one process: to start workers would take longer, and hide what is printed.
    """
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    one_process = option.usepdb or option.trace or option.collectonly or option.capture == "no"
    names = [argument for argument in config.args if not Path(argument).is_dir()]
    if option.numprocesses is None and option.dist == "no" and not (one_process or names):
        option.numprocesses = min(MOST, PER_CORE * (os.cpu_count() or 1))
        option.dist = "loadfile"
    option.loadscopereorder = False  # they are in order, see `sort`


def make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler that keeps groups together, also where only ``-n`` was given."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Groups(config, log) if config.option.dist in ("load", "loadfile") else None


def group(nodeid: str) -> str:
    """Return the name of the group that a test belongs to."""
    file = nodeid.partition("::")[0]
    return "real_model" if REAL_MODEL.search(file) else file


def sort(items: list[pytest.Item]) -> None:
    """Put first what takes longest: the real model, then what starts processes, the largest groups first."""
    sizes: dict[str, int] = {}
    for item in items:
        if item.get_closest_marker("process") is not None:
            sizes[group(item.nodeid)] = sizes.get(group(item.nodeid), 0) + 1
    items.sort(key=lambda item: (group(item.nodeid) != "real_model", -sizes.get(group(item.nodeid), 0)))


@contextmanager
def turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """Run a test beside those of other workers, or alone.

    Args:
        folder: the same one for all workers.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ or os.name != "posix":
        yield
        return
    import fcntl

    with (folder / "gate").open("w") as gate, (folder / "running").open("w") as running:
        fcntl.flock(gate, fcntl.LOCK_EX)  # whoever waits to be alone lets no other one begin
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield
