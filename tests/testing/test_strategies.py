"""Strategies for hypothesis: what they draw can be armed, and fires."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings

from ullm.errors import FaultInjected
from ullm.faults import POINTS, FaultInjector, FaultPlan, injected, point
from ullm.sampling import SamplingParams
from ullm.testing import run_virtually, strategies


@given(strategies.plans(strategies.ALL_POINTS, most=4))
def test_plans_for_all_points_can_be_armed(plan: str) -> None:
    injector = FaultInjector()
    injector.arm(plan)
    assert 1 <= len(injector.describe().armed) <= 4
    assert str(FaultPlan.parse(plan)) == plan


@given(strategies.faults(["worker.step"], actions=["crash"], latest=3))
def test_only_what_was_asked_for_is_drawn(fault: object) -> None:
    assert str(fault) in (
        "worker.step:crash",
        "worker.step:crash@nth=2",
        "worker.step:crash@nth=3",
    )


@settings(max_examples=30)
@given(strategies.plans(["ledger.write", "ledger.read"], latest=5, seconds=0.1))
def test_plans_for_points_of_a_program_fire(plan: str) -> None:
    async def program() -> None:
        for _ in range(10):
            for name in ("ledger.write", "ledger.read"):
                with trio.move_on_after(1):
                    try:
                        await point(name)
                    except (FaultInjected, OSError):
                        continue

    with injected(plan) as faults:
        run_virtually(program)
    assert all(fault.fired for fault in faults.describe().armed)


@given(strategies.prompts(), strategies.sampling_params())
def test_prompts_and_parameters_are_valid(prompt: list[int], params: SamplingParams) -> None:
    assert 1 <= len(prompt) <= 20
    assert all(strategies.FIRST_WORD <= token < 512 for token in prompt)
    assert params.greedy is (params.seed is None)


def test_every_point_of_ullm_is_known() -> None:
    assert set(strategies.ALL_POINTS) == set(POINTS)


def test_without_hypothesis_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "ullm.testing.strategies")
    with pytest.raises(ImportError, match=r"needs hypothesis: pip install hypothesis"):
        importlib.import_module("ullm.testing.strategies")
