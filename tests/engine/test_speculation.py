"""The engine with drafts, on a virtual clock: the same texts, whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.engine import STEP, Open, collect, tokens_of
from ullm.engine.status import EngineStatistics
from ullm.protocol.messages import Step
from ullm.sampling import SamplingParams
from ullm.testing import (
    FakeWorkers,
    ScriptedSettings,
    scripted_tokens,
    write_scripted_model,
)

COUNT = 60
PROMPTS = [[300 + number, 5, 6] for number in range(4)]
ASKED = [SamplingParams(temperature=number % 2, seed=number, max_tokens=COUNT) for number in range(4)]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted_model(tmp_path_factory.mktemp("repetitive"), repeat=6)


async def serve(
    opened: Open, fault: Callable[[FakeWorkers], None] | None = None, **options: Any
) -> tuple[list[list[int]], EngineStatistics, int]:
    """All requests at once; what each got, the statistics, and the steps that it took."""
    results: dict[int, list[int]] = {}

    async def one(number: int) -> None:
        results[number] = tokens_of(await collect(engine, PROMPTS[number], ASKED[number]))

    async with opened(**{"speculate": 6} | options) as (engine, workers):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(one, number)
            await trio.sleep(12.5 * STEP)
            if fault is not None:
                fault(workers)
        statistics = engine.statistics()
        steps = sum(isinstance(message, Step) for worker in workers.started for message in worker.received)
    return [results[number] for number in range(4)], statistics, steps


def expected(script: ScriptedSettings) -> list[list[int]]:
    return [scripted_tokens(*asked, COUNT, script) for asked in zip(PROMPTS, ASKED, strict=True)]


async def test_the_same_texts_in_fewer_steps(
    clock: MockClock, opened: Open, script: ScriptedSettings
) -> None:
    plain, before, many = await serve(opened, speculate=0)
    found, statistics, fewer = await serve(opened)
    assert found == plain == expected(script)
    assert fewer < 0.8 * many
    assert (before.draft_tokens_total, before.accepted_tokens_total) == (0, 0)
    assert statistics.draft_tokens_total >= statistics.accepted_tokens_total > COUNT
    assert statistics.generation_tokens_total == 4 * COUNT


@pytest.mark.parametrize("steps_ahead", [0, 1])
async def test_a_worker_lost_in_the_middle_costs_no_token(
    clock: MockClock, opened: Open, script: ScriptedSettings, steps_ahead: int
) -> None:
    def fault(workers: FakeWorkers) -> None:
        workers.started[-1].die("was killed by SIGSEGV")

    found, statistics, _ = await serve(opened, fault, steps_ahead=steps_ahead)
    assert found == expected(script)
    assert statistics.worker_restarts_total == 1
    assert statistics.requests_resumed_total == 4
    assert statistics.accepted_tokens_total > 0


async def test_too_few_blocks_for_all(clock: MockClock, opened: Open, script: ScriptedSettings) -> None:
    found, statistics, _ = await serve(opened, num_blocks=26, block_size=4, context_len=80)
    assert found == expected(script)
    assert statistics.preemptions_total > 0
    assert statistics.accepted_tokens_total > 0


async def test_stop_strings_end_the_text_within_a_draft(clock: MockClock, opened: Open) -> None:
    params = SamplingParams(temperature=0, max_tokens=COUNT)
    async with opened(speculate=6) as (engine, _):
        outputs = await collect(engine, PROMPTS[0], params)
        text = "".join(output.text for output in outputs)
        assert max(len(output.token_ids) for output in outputs) > 1
        for begin in range(20, 60, 7):
            stop = text[begin : begin + 5]
            asked = SamplingParams(temperature=0, max_tokens=COUNT, stop=stop)
            outputs = await collect(engine, PROMPTS[0], asked)
            assert "".join(output.text for output in outputs) == text[: text.index(stop)]
            assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)
        await trio.testing.wait_all_tasks_blocked()
        assert engine.statistics().kv_blocks_used == 0


async def test_leaving_between_drafts_frees_the_blocks(clock: MockClock, opened: Open) -> None:
    async with opened(speculate=6) as (engine, _):
        async with engine.generate(PROMPTS[0], ASKED[0]) as generation:
            async for output in generation:
                if len(output.token_ids) > 1:
                    break
        await trio.testing.wait_all_tasks_blocked()
        statistics = engine.statistics()
    assert (statistics.kv_blocks_used, statistics.running, statistics.waiting) == (0, 0, 0)
