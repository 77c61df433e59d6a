"""How long others wait: measured once, beside two requests."""

from __future__ import annotations

import pytest

from tests.benchmarks.holds import Hold, HoldsReport, run_holds
from tests.hostile.catalogue import COSTLY


def test_a_report_of_holds() -> None:
    report = HoldsReport("2026", [Hold("one token", 200, 0.0123, 0.004), Hold("a loop", 0, 60.0, 0.25)])
    assert "| one token | 200 | 12 | 4 |" in report.markdown()
    assert "| a loop | none | 60000 | 250 |" in report.markdown()


@pytest.mark.slow
@pytest.mark.process
def test_holds_of_a_scripted_server() -> None:
    report = run_holds(None, 60.0, COSTLY[:2])
    assert [hold.name for hold in report.holds[2:]] == [hostile.name for hostile in COSTLY[:2]]
    assert [hold.status for hold in report.holds] == [200, 200, 413, 400]
    assert all(0 < hold.longest < 10 for hold in report.holds)
