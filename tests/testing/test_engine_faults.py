"""Each point and action in a whole engine on a virtual clock: nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock

from ullm import EngineConfig, SamplingParams, open_engine
from ullm.engine.output import Output
from ullm.errors import ConfigError, EngineDead, OutOfMemory, WorkerLost
from ullm.faults import ACTOR_ACTIONS, POINTS, WORKER_ACTIONS
from ullm.testing import (
    FakeWorkers,
    ScriptedSettings,
    assert_finished_once,
    assert_no_token_lost,
    local_model,
    scripted_tokens,
)
from ullm.testing.control import FaultControl

if TYPE_CHECKING:
    from ullm.engine import Engine
    from ullm.testing.plugin import OpenEngine

PROMPT = [300, 301, 302]
GREEDY = SamplingParams(temperature=0, max_tokens=10)

STEP = [f"worker.step:{action}@nth=4" for action in WORKER_ACTIONS]
FRAMES = [
    f"{point}:{action}@nth=4,message={message}"
    for point, message in (("frame.to_worker", "Step"), ("frame.from_worker", "StepResult"))
    for action in POINTS[point]
]
ACTORS = [
    f"{point}:{action}@nth=3" + ("" if action == "raise" else ",seconds=0.01")
    for point in ("scheduler.step", "router.tokens")
    for action in ACTOR_ACTIONS
]
SEVERAL = [
    "worker.step:crash@nth=3; worker.start:crash@nth=2,times=2",
    "worker.step:slow@nth=3,seconds=90",
    "worker.step:crash@probability=0.2,times=2,seed=4",
    "frame.from_worker:delay@message=StepResult,nth=2,seconds=20; worker.step:stop@nth=5",
    "scheduler.step:raise@nth=3; router.tokens:raise@nth=6; worker.step:exit@nth=9",
    "worker.step:crash@nth=5; scheduler.step:raise@nth=5",
]


async def complete(engine: Engine) -> list[Output]:
    async with engine.generate(PROMPT, GREEDY) as generation:
        return [output async for output in generation]


@pytest.mark.parametrize("plan", [*STEP, *FRAMES, *ACTORS, *SEVERAL])
async def test_no_token_is_lost(
    ullm_clock: MockClock, ullm_engine: OpenEngine, ullm_scripted_model: Path, plan: str
) -> None:
    async with ullm_engine(step_seconds=1.0, faults=plan, max_restarts=5) as engine:
        with trio.fail_after(300):
            outputs = await complete(engine)
        assert {fired.point for fired in engine.faults.history} == {
            part.strip().split(":")[0] for part in plan.split(";")
        }
        await trio.testing.wait_all_tasks_blocked()
        assert engine.statistics().kv_blocks_used == 0
        assert [str(fired) for fired in engine.faults.history if not fired.effect] == []
    script = ScriptedSettings.read(str(ullm_scripted_model))
    assert_finished_once(outputs, "length")
    assert_no_token_lost(
        scripted_tokens(PROMPT, GREEDY, 10, script), [token for o in outputs for token in o.token_ids]
    )


@pytest.mark.parametrize("plan", ["worker.step:crash", "router.tokens:raise"])
async def test_a_fault_is_tied_to_a_request_and_its_nth_token(
    ullm_clock: MockClock, ullm_engine: OpenEngine, ullm_scripted_model: Path, plan: str
) -> None:
    answers: dict[str, list[Output]] = {}

    async def ask(engine: Engine, name: str) -> None:
        async with engine.generate(PROMPT, GREEDY, request_id=name) as generation:
            answers[name] = [output async for output in generation]

    async with ullm_engine(step_seconds=1.0, faults=f"{plan}@request=mine,token=5") as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, engine, "other")
            await trio.sleep(2.5)
            nursery.start_soon(ask, engine, "mine")
        (fired,) = engine.faults.history
    assert (fired.request, fired.token, fired.hit) == ("mine", 5, 1)
    script = ScriptedSettings.read(str(ullm_scripted_model))
    for outputs in answers.values():
        tokens = [token for output in outputs for token in output.token_ids]
        assert_no_token_lost(scripted_tokens(PROMPT, GREEDY, 10, script), tokens)


@pytest.mark.parametrize("plan", ["", "worker.step:crash@nth=4"])
async def test_log_probabilities_are_those_of_their_tokens(
    ullm_clock: MockClock, ullm_engine: OpenEngine, plan: str
) -> None:
    async with ullm_engine(step_seconds=1.0, faults=plan) as engine:
        async with engine.generate(PROMPT, replace(GREEDY, logprobs=2)) as generation:
            outputs = [output async for output in generation]
    tokens = [token for output in outputs for token in output.token_ids]
    scores = [score for output in outputs for score in output.logprobs or ()]
    assert [score.token_id for score in scores] == tokens
    assert len(tokens) == 10


async def test_a_loss_costs_a_moment(ullm_clock: MockClock, ullm_engine: OpenEngine) -> None:
    async with ullm_engine(step_seconds=1.0) as engine:
        began = trio.current_time()
        await complete(engine)
        undisturbed = trio.current_time() - began
        engine.faults.arm("worker.step:crash@nth=4")
        await complete(engine)
        (fired,) = engine.faults.history
        assert fired.recovered is not None
        assert fired.recovered < 2.0
        assert trio.current_time() - began - undisturbed < undisturbed + 3.0


async def test_a_hang_is_found_within_the_step_timeout(
    ullm_clock: MockClock, ullm_engine: OpenEngine
) -> None:
    async with ullm_engine(step_seconds=1.0, faults="worker.step:hang@nth=4", step_timeout=30) as engine:
        await complete(engine)
        (fired,) = engine.faults.history
        assert fired.recovered is not None
        assert 29.0 < fired.recovered < 33.0


async def test_probes_tell_what_is(ullm_clock: MockClock, ullm_engine: OpenEngine) -> None:
    async with ullm_engine(step_seconds=1.0, load_seconds=5.0) as engine:
        assert (engine.health().ready, engine.health().state) == (True, "running")
        engine.faults.arm("worker.step:crash")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(complete, engine)
            await trio.sleep(2.0)
            assert (engine.health().ready, engine.health().state) == (False, "restarting")
            assert engine.health().live
            await trio.sleep(6.0)
            assert engine.health().ready
            engine.request_shutdown()
            await trio.testing.wait_all_tasks_blocked()
            assert (engine.health().ready, engine.health().state) == (False, "draining")
            assert engine.health().live


@pytest.mark.parametrize("action", ACTOR_ACTIONS)
async def test_a_prompt_is_encoded_all_the_same(
    ullm_clock: MockClock, ullm_engine: OpenEngine, action: str
) -> None:
    lasting = "" if action == "raise" else "@seconds=0.01"
    async with ullm_engine(faults=f"tokenizer.encode:{action}{lasting}") as engine:
        assert engine.tokenizer is not None
        ids = await engine.tokenizer.encode("The supervisor")
        assert engine.tokenizer.decode(ids) == "The supervisor"
        assert len(engine.faults.history) == 1


async def test_an_idle_worker_that_hangs_is_found(ullm_clock: MockClock, ullm_engine: OpenEngine) -> None:
    async with ullm_engine(faults="worker.ping:hang", step_timeout=10, health_interval=5) as engine:
        with trio.fail_after(30):
            while engine.statistics().worker_restarts_total == 0:  # noqa: ASYNC110  # virtual time
                await trio.sleep(1)
        await complete(engine)


@pytest.mark.parametrize("point", ["worker.sleep", "worker.wake"])
async def test_sleep_and_wake_survive_a_crash(
    ullm_clock: MockClock, ullm_engine: OpenEngine, ullm_faults: FaultControl, point: str
) -> None:
    async with ullm_engine(step_seconds=1.0) as engine:
        before = await complete(engine)
        ullm_faults.arm(f"{point}:crash")
        with trio.fail_after(300):
            await engine.sleep(1)
            await engine.wake()
            after = await complete(engine)
        assert [fired.point for fired in ullm_faults.history] == [point]
    assert_no_token_lost(
        [token for o in before for token in o.token_ids], [token for o in after for token in o.token_ids]
    )


async def test_a_worker_that_does_not_stop_is_killed_in_time(
    ullm_clock: MockClock, ullm_engine: OpenEngine
) -> None:
    async with ullm_engine(faults="worker.stop:hang", shutdown_timeout=10) as engine:
        await complete(engine)
        began = trio.current_time()
    assert engine.report is not None
    assert (engine.report.killed, engine.report.exit_code) == (1, 0)
    assert trio.current_time() - began <= 10


async def test_a_worker_that_cannot_start(ullm_clock: MockClock, ullm_engine: OpenEngine) -> None:
    with pytest.raises(WorkerLost, match="was killed by SIGKILL"):
        async with ullm_engine(faults="worker.start:crash"):
            pass
    with pytest.raises(OutOfMemory, match="injected fault: out of memory while loading"):
        async with ullm_engine(faults="worker.start:oom"):
            pass


async def test_faults_without_end_end_the_engine_with_their_cause(
    ullm_clock: MockClock, ullm_engine: OpenEngine
) -> None:
    with pytest.raises(EngineDead, match="was killed by SIGKILL"):
        async with ullm_engine(step_seconds=1.0, faults="worker.ping:crash@times=always", health_interval=1):
            await trio.sleep_forever()


async def test_a_bad_plan_opens_nothing(ullm_clock: MockClock, ullm_engine: OpenEngine) -> None:
    with pytest.raises(ConfigError, match=r"--faults: 'worker\.step:explode': no action"):
        async with ullm_engine(faults="worker.step:explode"):
            pass


async def test_the_tests_plan_is_in_all_its_engines(
    ullm_clock: MockClock, ullm_engine: OpenEngine, ullm_faults: FaultControl
) -> None:
    ullm_faults.arm("worker.step:slow@seconds=3; seed=2")
    workers = FakeWorkers()
    async with ullm_engine(workers=workers) as first, ullm_engine() as second:
        for engine in (first, second):
            await complete(engine)
        assert len(ullm_faults.history) == 2
        ullm_faults.arm("worker.step:slow@seconds=3")
        for engine in (first, second):
            await complete(engine)
        ullm_faults.clear()
        for engine in (first, second):
            assert engine.faults.describe().armed == []
    assert len(ullm_faults.history) == 4
    async with ullm_engine() as third:
        await complete(third)
    assert len(ullm_faults.history) == 4
    assert len(workers.started) == 1


async def test_a_thread_that_hangs_is_replaced_soon_and_not_forgotten(ullm_scripted_model: Path) -> None:
    config = EngineConfig(
        model=str(ullm_scripted_model),
        runner="ullm.testing:ScriptedRunner",
        transport="thread",
        step_timeout=0.3,
        faults="worker.step:hang@nth=3,seconds=3",
    )
    began = trio.current_time()
    async with open_engine(config, find_model=lambda config: local_model(ullm_scripted_model)) as engine:
        assert_finished_once(await complete(engine), "length")
    assert trio.current_time() - began < 3
    assert engine.report is not None
    assert (engine.report.abandoned, engine.report.exit_code) == (1, 71)
