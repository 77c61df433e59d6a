"""Restart decisions on plain values."""

from __future__ import annotations

import math

import pytest

from ullm.supervision.policy import (
    AutoShutdown,
    ExitKind,
    Restart,
    RestartWindow,
    Strategy,
    affected,
    exponential_backoff,
    should_restart,
    shuts_down,
)

MATRIX = [
    (Restart.PERMANENT, ExitKind.NORMAL, True),
    (Restart.PERMANENT, ExitKind.SHUTDOWN, True),
    (Restart.PERMANENT, ExitKind.ABNORMAL, True),
    (Restart.TRANSIENT, ExitKind.NORMAL, False),
    (Restart.TRANSIENT, ExitKind.SHUTDOWN, False),
    (Restart.TRANSIENT, ExitKind.ABNORMAL, True),
    (Restart.TEMPORARY, ExitKind.NORMAL, False),
    (Restart.TEMPORARY, ExitKind.SHUTDOWN, False),
    (Restart.TEMPORARY, ExitKind.ABNORMAL, False),
]


@pytest.mark.parametrize(("restart", "exit_kind", "expected"), MATRIX)
def test_restart_matrix(restart: Restart, exit_kind: ExitKind, expected: bool) -> None:
    assert should_restart(restart, exit_kind) is expected


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Strategy.ONE_FOR_ONE, ["b"]),
        (Strategy.DYNAMIC, ["b"]),
        (Strategy.REST_FOR_ONE, ["b", "c"]),
        (Strategy.ONE_FOR_ALL, ["a", "b", "c"]),
    ],
)
def test_affected_children(strategy: Strategy, expected: list[str]) -> None:
    assert list(affected(strategy, iter("abc"), "b")) == expected


@pytest.mark.parametrize(
    ("mode", "significant", "others", "expected"),
    [
        (AutoShutdown.NEVER, True, False, False),
        (AutoShutdown.ANY_SIGNIFICANT, True, True, True),
        (AutoShutdown.ANY_SIGNIFICANT, False, False, False),
        (AutoShutdown.ALL_SIGNIFICANT, True, True, False),
        (AutoShutdown.ALL_SIGNIFICANT, True, False, True),
        (AutoShutdown.ALL_SIGNIFICANT, False, False, False),
    ],
)
def test_auto_shutdown(mode: AutoShutdown, significant: bool, others: bool, expected: bool) -> None:
    assert shuts_down(mode, significant, lambda: others) is expected


def test_window_allows_intensity_and_no_more() -> None:
    window = RestartWindow(intensity=2, period=5.0)
    assert [window.record(now) for now in (0.0, 1.0, 2.0)] == [True, True, False]


def test_window_slides() -> None:
    window = RestartWindow(intensity=2, period=5.0)
    assert all(window.record(now) for now in (0.0, 4.0, 5.1, 9.2, 10.2))
    assert len(window) == 2


def test_restart_exactly_one_period_ago_still_counts() -> None:
    window = RestartWindow(intensity=1, period=5.0)
    assert window.record(0.0)
    assert not window.record(5.0)


def test_intensity_zero_allows_no_restart() -> None:
    assert not RestartWindow(intensity=0, period=5.0).record(0.0)


def test_infinite_intensity_never_gives_up() -> None:
    window = RestartWindow(intensity=math.inf, period=1.0)
    assert all(window.record(float(now) / 1000) for now in range(5000))


def test_backoff_doubles_up_to_its_limit() -> None:
    delay = exponential_backoff(0.1, 1.0)
    assert [delay(n) for n in (1, 2, 3, 4, 5)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0])
    assert delay(10**6) == 1.0
