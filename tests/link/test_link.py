"""A front end and its engine: requests go on through the loss of either connection or engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.engine import PROMPT, collect, tokens_of
from tests.support.linked import World, front_end, linked
from ullm.engine.output import Output
from ullm.errors import EngineNotReady
from ullm.link import RemoteEngine
from ullm.sampling import SamplingParams
from ullm.testing import open_scripted_engine

PARAMS = SamplingParams(temperature=0.8, seed=5, max_tokens=8, n=2, logprobs=2, prompt_logprobs=1)


async def undisturbed(model: Path, params: SamplingParams = PARAMS) -> tuple[list[Output], Any]:
    async with open_scripted_engine(model, step_seconds=1.0) as engine:
        async with engine.generate(PROMPT, params) as generation:
            outputs = [output async for output in generation]
            return outputs, generation.prompt_logprobs


async def ask(engine: RemoteEngine, params: SamplingParams = PARAMS) -> tuple[list[Output], Any]:
    async with engine.generate(PROMPT, params) as generation:
        outputs = [output async for output in generation]
        return outputs, generation.prompt_logprobs


def summary(outputs: list[Output], index: int) -> tuple[Any, ...]:
    """Everything that a client sees of a choice, however it is cut into outputs."""
    mine = [output for output in outputs if output.index == index]
    scores = [score for output in mine for score in output.logprobs or ()]
    ends = [output.finish_reason for output in mine if output.finish_reason is not None]
    usage = mine[-1].num_prompt_tokens, mine[-1].num_generated_tokens
    return tokens_of(outputs, index), "".join(output.text for output in mine), scores, ends, usage


async def test_through_a_link_an_engine_answers_as_itself(clock: MockClock, model: Path) -> None:
    expected, scores = await undisturbed(model)
    async with linked(model) as (engine, _):
        outputs, prompt_scores = await ask(engine)
    assert [summary(outputs, index) for index in (0, 1)] == [summary(expected, index) for index in (0, 1)]
    assert prompt_scores == scores
    assert len(scores) == len(PROMPT)


async def test_the_connection_is_lost_at_every_message(clock: MockClock, model: Path) -> None:
    """A connection lives for so many frames, and the next one to the end."""
    expected, scores = await undisturbed(model)
    cuts, reached = 0, True
    while reached:
        cuts += 1
        async with linked(model, cut_after=lambda number, cuts=cuts: cuts if number == 1 else None) as (
            engine,
            world,
        ):
            outputs, prompt_scores = await ask(engine)
            reached = world.connections > 1
        assert [summary(outputs, index) for index in (0, 1)] == [
            summary(expected, index) for index in (0, 1)
        ], f"cut after {cuts} frames"
        assert prompt_scores == scores
    assert cuts > 12


async def test_the_engine_is_lost_at_every_token(clock: MockClock, model: Path) -> None:
    expected, scores = await undisturbed(model)
    for tokens in range(1 + 2 * 8):
        async with linked(model) as (engine, world), trio.open_nursery() as nursery:
            outputs: list[Output] = []

            async def replace_engine(world: World = world) -> None:
                world.kill()
                await trio.sleep(20)
                await world.start_engine()

            async with engine.generate(PROMPT, PARAMS) as generation:
                seen = 0
                if tokens == 0:
                    nursery.start_soon(replace_engine)
                async for output in generation:
                    outputs.append(output)
                    before, seen = seen, seen + len(output.token_ids)
                    if before < tokens <= seen:
                        nursery.start_soon(replace_engine)
                assert generation.prompt_logprobs == scores
        assert len(world.engines) == 2
        assert [summary(outputs, index) for index in (0, 1)] == [
            summary(expected, index) for index in (0, 1)
        ], f"lost after {tokens} tokens"


async def test_three_engines_in_a_row_are_lost(clock: MockClock, model: Path) -> None:
    expected, _ = await undisturbed(model)
    async with linked(model) as (engine, world), trio.open_nursery() as nursery:

        async def lose_three() -> None:
            for _ in range(3):
                await trio.sleep(2.5)
                world.kill()
                await world.start_engine()

        nursery.start_soon(lose_three)
        outputs, _ = await ask(engine)
    assert len(world.engines) == 4
    assert [summary(outputs, index) for index in (0, 1)] == [summary(expected, index) for index in (0, 1)]


async def test_a_request_that_comes_while_the_engine_is_away_waits(clock: MockClock, model: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    async with linked(model, max_waiting=2) as (engine, world), trio.open_nursery() as nursery:
        expected = tokens_of(await collect(engine, params=params))
        world.kill()
        await trio.testing.wait_all_tasks_blocked()
        health = engine.health()
        assert (health.state, health.ready, health.live) == ("restarting", False, True)
        found: list[list[int]] = []
        all_there = trio.Event()

        async def wait() -> None:
            found.append(tokens_of(await collect(engine, params=params)))
            if len(found) == 2:
                all_there.set()

        for _ in range(2):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(EngineNotReady, match="2 requests wait for it") as refused:
            engine.check_admission()
        assert refused.value.status == 503
        await world.start_engine()
        with trio.fail_after(60):
            await all_there.wait()
        assert found == [expected, expected]
        assert engine.health().ready


async def test_requests_do_not_wait_for_ever(clock: MockClock, model: Path) -> None:
    async with linked(model, engine_timeout=30.0) as (engine, world):
        async with engine.generate(PROMPT, SamplingParams(max_tokens=50)) as generation:
            await anext(generation)
            world.kill()
            began = trio.current_time()
            with pytest.raises(EngineNotReady, match="away for more than 30 s"):
                async for _ in generation:
                    pass
            assert 29 < trio.current_time() - began < 32
        with pytest.raises(EngineNotReady, match="away for more than 30 s"):
            engine.check_admission()
        await world.start_engine()
        await trio.sleep(2)
        assert len(tokens_of(await collect(engine))) == 10


async def test_a_front_end_that_leaves_takes_its_requests_along(clock: MockClock, model: Path) -> None:
    async with trio.open_nursery() as nursery:
        world = World(model, nursery)
        there = await world.start_engine()
        first, second = front_end(world), front_end(world)
        await nursery.start(first.run)
        await nursery.start(second.run)
        params = SamplingParams(temperature=0, max_tokens=30)
        async with first.generate(PROMPT, params) as mine, second.generate(PROMPT, params) as other:
            await anext(mine)
            await anext(other)
            assert there.statistics().running == 2
            world._sessions[0].cancel()  # as the kernel closes what a killed process had open
            first.kill(9)
            rest = [output async for output in other]
            assert rest[-1].finish_reason == "length"
        await first.wait_stopped()
        assert there.statistics().running == 0
        second.request_shutdown(0.0)
        await second.wait_stopped()
        world.kill()
