"""What every test is held to, and how tests share a machine: workers, turns, tiers.

`pytest` without names of files or options that need one process runs in several (see
`tests.support.workers`); each test that starts processes leaves none of them, nor what they use, behind.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from tests.support import workers
from tests.support.engine import clock as clock
from tests.support.engine import model as model
from tests.support.engine import opened as opened
from tests.support.engine import script as script
from ullm.testing.leaks import LeakCheck

hypothesis.settings.register_profile(
    "ullm", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("ullm")  # how long an example takes is up to who else runs here

collect_ignore = ["outsider/project"]
"""Tests of a project that is not this one."""


def pytest_configure() -> None:
    """Prepare what all that the tests start inherits.

    PyTorch's threads are not to spin while they wait: that takes the cores from whatever else runs, and
    multiplies what a step takes. What background jobs and nohup ignore is not to be ignored. Compiled modules
    are kept, or each of the servers that the tests start would compile the package again.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for number, default in ((signal.SIGINT, signal.default_int_handler), *_HANGUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)


_HANGUP = ((signal.SIGHUP, signal.SIG_DFL),) if hasattr(signal, "SIGHUP") else ()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the number
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Take several workers for whole folders of tests."""
    workers.choose_number(config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep together what shares a server or a model."""
    return workers.make_scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left with it at the end."""
    workers.sort(items)


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collections, which would take 0.3 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def turn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let a test that measures seconds run while no other worker runs a test."""
    alone = request.node.get_closest_marker("timing") is not None
    with workers.turn(tmp_path_factory.getbasetemp().parent, alone=alone):
        yield


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, turn: None) -> Iterator[None]:
    """Find what the test has left: processes, shared memory, listening sockets, descriptors.

    What a fixture of a wider scope has started is there before, because those come first.
    """
    if request.node.get_closest_marker("process") is None:
        yield
        return
    check = LeakCheck()
    yield
    check.check()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Undo what a test that runs a command in this process does to the logs of ullm."""
    logger = logging.getLogger("ullm")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)
