"""The seconds of a stop add up to what docs/explanation/behaviour.md promises."""

from __future__ import annotations

import pytest

from ullm.config import EngineConfig
from ullm.protocol import stop_budget as budget
from ullm.supervision.shutdown import KILL_GRACE, SETTLE

TREE = (
    budget.LIFECYCLE,
    budget.ROUTER,
    budget.SCHEDULER,
    budget.STANDBY_POOL,
    budget.TOKENIZER,
    budget.HTTP_SERVER,
    budget.HTTP_SERVER,
)
"""Budgets of all children but the worker groups, which have all that is left."""


@pytest.mark.parametrize("timeout", [0.0, 1.0, 3.0, 25.0, EngineConfig().shutdown_timeout, 600.0])
def test_the_stages_of_the_engine_fit_into_its_deadline(timeout: float) -> None:
    tree = budget.TEARDOWN_RESERVE - budget.READER_FLUSH
    assert tree > 0
    assert budget.drain_seconds(timeout) + budget.READER_FLUSH + tree == budget.engine_seconds(timeout)
    assert budget.engine_seconds(timeout) == max(timeout, budget.TEARDOWN_RESERVE)


@pytest.mark.parametrize("timeout", [0.0, 1.0, 3.0, 25.0, 600.0])
def test_the_watchdog_comes_after_everything_that_could_be_late(timeout: float) -> None:
    """Were every child of the tree to ignore its budget, each would be killed and abandoned in turn."""
    stages = len(TREE) + 1
    overrun = stages * (SETTLE + KILL_GRACE) + budget.PROCESS_EXIT + budget.STDERR_TAIL
    if timeout >= budget.TEARDOWN_RESERVE:
        assert overrun < budget.WATCHDOG_MARGIN
    assert budget.engine_seconds(timeout) < budget.watchdog_seconds(timeout)
    assert budget.watchdog_seconds(timeout) == timeout + 5.0, "as docs/explanation/behaviour.md promises"


def test_what_children_have_is_more_than_what_they_spend_inside() -> None:
    assert budget.CONNECTION_CUT_RESERVE < budget.HTTP_SERVER
    assert budget.STANDBY_WORKER + budget.PROCESS_EXIT + budget.STDERR_TAIL < budget.STANDBY_POOL
    assert budget.FAULT_SHARE < budget.SIGTERM_SHARE < budget.SIGKILL_SHARE <= budget.RANK_SHARE < 1
    assert budget.RAY_KILL_SHARE < budget.RANK_SHARE
    assert budget.THREAD_REPORT < budget.THREAD_GIVEN_UP < budget.THREAD_LEAVE
    assert budget.LOG_FLUSH < budget.PROCESS_LEAVE


def test_a_process_that_starts_is_gone_within_two_seconds() -> None:
    """Promised for a signal while it loads: its workers have nothing to finish."""
    assert budget.STARTING_WORKER < 2.0


def test_a_third_signal_ends_a_process_sooner_than_any_budget() -> None:
    assert budget.FORCED_EXIT < budget.TEARDOWN_RESERVE < budget.WATCHDOG_MARGIN
