"""Many requests, a tenth of them costly or malformed, beside 8 streams of others, which hardly notice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hostile.many_requests import run_many

pytestmark = [pytest.mark.process, pytest.mark.skipif(os.name != "posix", reason="counts descriptors")]

MANY = 100_000
GAP_FLOOR = 0.5
"""Seconds of a gap that a machine with other work may have by itself; the docs say what was measured."""
GROWTH = 64 << 20
"""Bytes by which a warm server may grow: answers of several MiB are in flight, and not all is given back."""


@pytest.mark.filterwarnings(
    # httpx leaves the body of a request unread whose HTTP/2 stream the server has refused.
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
@pytest.mark.parametrize(
    "count",
    [
        pytest.param(150, marks=pytest.mark.slow),
        pytest.param(MANY, marks=[pytest.mark.long, pytest.mark.timeout(4 * 3600)]),
    ],
)
def test_victims_go_on_and_nothing_is_left(tmp_path: Path, count: int, http2: bool) -> None:
    outcome = run_many(tmp_path, count, http2=http2)
    assert not outcome.wrong
    assert not outcome.failed
    assert outcome.events > 0
    if count == MANY:  # beside other tests a gap says nothing
        assert outcome.gap <= max(3 * outcome.gap_alone, GAP_FLOOR)
    assert outcome.after[0] <= outcome.before[0]
    assert outcome.after[1] <= outcome.before[1] + GROWTH
    assert outcome.status == 0
