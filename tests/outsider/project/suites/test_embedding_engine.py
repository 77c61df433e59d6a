"""A program that embeds the engine, on trio and on a virtual clock."""

import sys

import pytest
from hypothesis import HealthCheck, given, settings

from ullm import SamplingParams
from ullm.testing import (
    ScriptedSettings,
    assert_finished_once,
    assert_no_token_lost,
    open_scripted_engine,
    run_virtually,
    scripted_tokens,
    strategies,
)

PROMPT = [300, 301, 302]
GREEDY = SamplingParams(temperature=0, max_tokens=20)


async def complete(engine, prompt=PROMPT, params=GREEDY):
    async with engine.generate(prompt, params) as generation:
        return [output async for output in generation]


def check(outputs, model, prompt=PROMPT, params=GREEDY):
    script = ScriptedSettings.read(str(model))
    assert_finished_once(outputs, "length")
    expected = scripted_tokens(prompt, params, params.max_tokens, script)
    assert_no_token_lost(expected, [token for output in outputs for token in output.token_ids])


@pytest.mark.trio
@pytest.mark.parametrize(
    "plan", ["worker.step:crash@nth=7", "worker.step:hang@nth=7", "scheduler.step:raise@nth=3"]
)
async def test_nothing_is_lost(ullm_clock, ullm_engine, ullm_scripted_model, plan):
    async with ullm_engine(step_seconds=1.0, faults=plan) as engine:
        check(await complete(engine), ullm_scripted_model)


@pytest.mark.trio
async def test_a_fault_is_tied_to_a_token(ullm_clock, ullm_engine, ullm_faults, ullm_scripted_model):
    ullm_faults.arm("worker.step:crash@token=5")
    async with ullm_engine(step_seconds=1.0) as engine:
        check(await complete(engine), ullm_scripted_model)
    assert [(fired.token, bool(fired.effect)) for fired in ullm_faults.history] == [(5, True)]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    plan=strategies.plans(most=2, latest=8),
    prompt=strategies.prompts(),
    params=strategies.sampling_params(max_tokens=12, choices=1),
)
def test_nothing_is_lost_whatever_happens(ullm_scripted_model, plan, prompt, params):
    async def run():
        options = {"step_seconds": 1.0, "step_timeout": 30, "max_restarts": 9}
        async with open_scripted_engine(ullm_scripted_model, faults=plan, **options) as engine:
            return await complete(engine, prompt, params)

    check(run_virtually(run), ullm_scripted_model, prompt, params)


def test_there_is_no_torch():
    assert "torch" not in sys.modules or sys.modules["torch"] is None
    with pytest.raises(ImportError):
        import torch  # noqa: F401
