"""The arithmetic of a stop, and the reports of children."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullm.supervision import BRUTAL_KILL, INFINITY, ChildReport
from ullm.supervision.shutdown import stage_budget


def test_each_stage_gets_its_own_budget_if_all_fit() -> None:
    assert stage_budget(25.0, 5.0, later=20.0) == 5.0
    assert stage_budget(INFINITY, 5.0, later=100.0, unlimited=1) == 5.0


def test_scarce_time_is_divided_in_proportion() -> None:
    assert stage_budget(10.0, 5.0, later=15.0) == pytest.approx(2.5)
    assert stage_budget(10.0, INFINITY, later=10.0) == pytest.approx(5.0)
    assert stage_budget(10.0, INFINITY, unlimited=1) == pytest.approx(5.0)


def test_unused_time_passes_on() -> None:
    first = stage_budget(10.0, 10.0, later=10.0)
    assert first == pytest.approx(5.0)
    assert stage_budget(10.0 - 1.0, 10.0) == pytest.approx(9.0)  # the first took 1 s of its 5


def test_nothing_is_left_after_the_deadline() -> None:
    assert stage_budget(0.0, 5.0) == 0.0
    assert stage_budget(-math.inf, INFINITY) == 0.0


budgets = st.lists(st.floats(0.0, 1e3) | st.just(INFINITY), min_size=1, max_size=20)


@given(st.floats(0.0, 1e3), budgets, st.data())
def test_stages_never_exceed_the_deadline_nor_their_own_budget(
    remaining: float, stages: list[float], data: st.DataObject
) -> None:
    left = remaining
    for index, budget in enumerate(stages):
        later = stages[index + 1 :]
        share = stage_budget(left, budget, sum(b for b in later if b < INFINITY), later.count(INFINITY))
        assert 0.0 <= share <= min(budget, left) + 1e-9
        left -= data.draw(st.floats(0.0, 1.0)) * share
    assert left >= -1e-6


@given(st.floats(1.0, 1e3), budgets.filter(lambda stages: all(b >= 0.01 for b in stages)))
def test_no_stage_starves_when_all_use_their_time_up(remaining: float, stages: list[float]) -> None:
    left = remaining
    for index, budget in enumerate(stages):
        later = stages[index + 1 :]
        share = stage_budget(left, budget, sum(b for b in later if b < INFINITY), later.count(INFINITY))
        assert share > 0.0
        left -= share


def test_child_reports_count_workers_at_any_depth() -> None:
    leaf = ChildReport("pump", "abandoned", 1.0)
    tree = ChildReport("heating", "killed", 1.0, children=(leaf, ChildReport("valve", "stopped", 0.1)))
    assert tree.count("abandoned") == 1
    assert tree.count("killed") == 0
    assert tree.count("stopped") == 1


def test_brutal_kill_is_no_budget() -> None:
    assert stage_budget(INFINITY, BRUTAL_KILL) == 0.0
