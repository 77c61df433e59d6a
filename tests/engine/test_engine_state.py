"""The order of an engine's states."""

from __future__ import annotations

import itertools

import pytest

from ullm.engine import EngineState

ORDER = [
    EngineState.STARTING,
    EngineState.RUNNING,
    EngineState.DRAINING,
    EngineState.ABORTING,
    EngineState.STOPPING,
    EngineState.STOPPED,
]


def test_states_only_go_forward() -> None:
    for (i, old), (j, new) in itertools.product(enumerate(ORDER), repeat=2):
        assert old.may_become(new) is (i < j)


@pytest.mark.parametrize("state", ORDER)
def test_failed_is_final_and_follows_everything_but_stopped(state: EngineState) -> None:
    assert state.may_become(EngineState.FAILED) is (state is not EngineState.STOPPED)
    assert not EngineState.FAILED.may_become(state)


def test_what_counts_as_stopping() -> None:
    assert not EngineState.RUNNING.is_stopping
    assert EngineState.DRAINING.is_stopping
    assert EngineState.FAILED.is_stopping
