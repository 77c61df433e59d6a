"""Cancelling an engine with a real worker process at each step of its life; nothing is left over."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import psutil
import pytest
import trio

from tests.support.cancelling import MAX_STEPS, cancelled_at
from tests.support.waiting import eventually
from ullm.config import EngineConfig
from ullm.engine import open_engine
from ullm.sampling import SamplingParams
from ullm.testing import local_model

pytestmark = [pytest.mark.process, pytest.mark.skipif(os.name != "posix", reason="counts descriptors")]


async def live(model: Path) -> None:
    """Start, answer, stop."""
    config = EngineConfig(
        runner="ullm.testing:ScriptedRunner", model=str(model), standby_workers=0, cpu_calibration=False
    )
    async with open_engine(config, find_model=lambda config: local_model(model)) as engine:
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        async with engine.generate("The supervisor", params) as generation:
            assert sum([len(output.token_ids) async for output in generation]) == 3


def cancel_at_steps(model: Path, first: int, every: int) -> int:
    """Cancel at the steps ``first``, ``first + every``, …, until a run ends before; return the last one."""
    this = psutil.Process()
    trio.run(live, model)  # what is opened once
    before, others = this.num_fds(), this.children(recursive=True)
    for step in range(first, MAX_STEPS, every):
        reached = trio.run(cancelled_at, step, partial(live, model))
        left = [child for child in this.children(recursive=True) if child not in others]
        assert not left, f"step {step}: processes are left"
        eventually(lambda: this.num_fds() <= before)
        if not reached:
            return step
    raise AssertionError(f"it takes more than {MAX_STEPS} steps")


@pytest.mark.slow
def test_cancelled_at_some_steps(model: Path) -> None:
    assert cancel_at_steps(model, 5, 23) > 100


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_cancelled_at_each_step(model: Path) -> None:
    assert cancel_at_steps(model, 1, 1) > 100
