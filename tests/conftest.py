"""What every test is held to: one that starts processes leaves none of them, nor what they use, behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from ullm.testing.leaks import LeakCheck


def pytest_configure() -> None:
    """A shell's background jobs ignore SIGINT, and so would all that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No process, shared memory, listening socket or descriptor more than before the test.

    What a fixture of a wider scope has started is there before, because those come first.
    """
    if request.node.get_closest_marker("process") is None:
        yield
        return
    check = LeakCheck()
    yield
    check.check()
