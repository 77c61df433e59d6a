"""The whole engine is suspended, workers and all: nobody is at fault, and nobody is replaced."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from tests.support.engine import PROMPT, STEP, Open, collect, tokens_of
from ullm.actors.transports.fake import FakeWorker
from ullm.engine import Engine
from ullm.engine.output import Output
from ullm.sampling import SamplingParams
from ullm.testing import FakeBehaviour, ScriptedSettings, scripted_tokens

GREEDY = SamplingParams(temperature=0, max_tokens=10)


class BackgroundRequest:
    """A request whose outputs a task collects."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.done = trio.Event()

    async def run(self, engine: Engine) -> None:
        self.outputs = await collect(engine, params=GREEDY)
        self.done.set()


async def freeze(clock: MockClock, worker: FakeWorker) -> None:
    """Let 25 s pass in which neither the engine nor the worker runs; then it needs another second."""
    worker.hang()
    clock.jump(25.0)
    await trio.sleep(1.0)
    worker.resume()


@pytest.mark.parametrize("moment", [2.1, 2.9])
@pytest.mark.parametrize("step_timeout", [2.0, 20.0, 25.5])
async def test_a_frozen_engine_goes_on(
    step_timeout: float, moment: float, clock: MockClock, opened: Open, script: ScriptedSettings
) -> None:
    running = BackgroundRequest()
    async with (
        opened(FakeBehaviour(step_seconds=STEP), step_timeout=step_timeout) as (engine, workers),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(running.run, engine)
        await trio.sleep(moment)
        await freeze(clock, workers.started[0])
        await running.done.wait()
        assert len(workers.started) == 1
    assert tokens_of(running.outputs) == scripted_tokens(PROMPT, GREEDY, 10, script)


async def test_a_worker_that_loads_in_a_frozen_engine_is_waited_for(clock: MockClock, opened: Open) -> None:
    async with opened(FakeBehaviour(load_seconds=1.0), start_timeout=60.0) as (_, workers):
        assert len(workers.started) == 1
        workers.started[0].die("was killed")
        await trio.sleep(0.5)
        await freeze(clock, workers.started[1])
        await trio.sleep(5.0)
        assert len(workers.started) == 2


async def test_a_worker_that_hangs_is_still_noticed_after_a_freeze(clock: MockClock, opened: Open) -> None:
    running = BackgroundRequest()
    async with (
        opened(FakeBehaviour(step_seconds=STEP), step_timeout=5.0) as (engine, workers),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(running.run, engine)
        await trio.sleep(2.5)
        workers.started[0].hang()
        clock.jump(25.0)
        await trio.sleep(7.0)
        assert len(workers.started) == 2
        await running.done.wait()
