"""What every test is held to: one that starts processes leaves none of them, nor what they use, behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ullm.testing.leaks import LeakCheck


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
