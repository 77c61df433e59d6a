"""The report of an engine's stop."""

from __future__ import annotations

import pytest

from ullm.engine import ShutdownReport
from ullm.engine.shutdown_report import StageReport, stages_of
from ullm.supervision import ChildReport


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (ShutdownReport("SIGTERM"), 0),
        (ShutdownReport("SIGTERM", aborted=3), 0),
        (ShutdownReport("SIGTERM", killed=1), 0),
        (ShutdownReport("failure", started=False, failure="no such model"), 1),
        (ShutdownReport("failure", failure="worker lost", abandoned=1), 70),
        (ShutdownReport("SIGTERM", abandoned=1), 71),
        (ShutdownReport("SIGINT", abandoned=1, forced_by=2), 130),
        (ShutdownReport("SIGTERM", failure="late", forced_by=15), 143),
    ],
)
def test_exit_codes(report: ShutdownReport, code: int) -> None:
    assert report.exit_code == code


def test_report_is_one_line_with_every_stage() -> None:
    report = ShutdownReport(
        "SIGTERM",
        drained=12,
        aborted=3,
        killed=1,
        stages=(StageReport("drain", 2.0), StageReport("http", 0.123, "killed")),
        seconds=2.5,
    )
    assert str(report) == (
        "stopped in 2.50 s by SIGTERM: 12 drained, 3 aborted, 1 killed, 0 abandoned; "
        "drain 2.00 s done, http 0.12 s killed; exit code 0"
    )


def test_report_names_the_failure() -> None:
    assert "failure: worker lost; exit code 70" in str(ShutdownReport("failure", failure="worker lost"))


def test_children_are_stages() -> None:
    leaf = ChildReport("rank0", "abandoned", 1.0)
    report = ChildReport("replica0", "killed", 1.0, children=(leaf, ChildReport("scheduler", "stopped", 0.1)))
    assert stages_of([report]) == (StageReport("replica0", 1.0, "killed"),)
