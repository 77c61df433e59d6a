"""A model that sees a window, on a virtual clock: long texts in few blocks, whatever happens in between."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.support.engine import STEP, Open, collect, tokens_of
from ullm.engine import Engine
from ullm.sampling import SamplingParams
from ullm.scheduling.sequence_blocks import most_blocks
from ullm.testing import FakeWorkers, ScriptedSettings, scripted_tokens, write_scripted_model

WINDOW, BLOCK, TOKENS, COUNT = 20, 4, 32, 60
PROMPTS = [[300 + number, *range(3, 203)] for number in range(3)]
ASKED = [SamplingParams(temperature=number % 2, seed=number, max_tokens=COUNT) for number in range(3)]

Disturbance = Callable[[Engine, FakeWorkers], Awaitable[object]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checks before each step that the blocks have what its tokens see."""
    return write_scripted_model(tmp_path_factory.mktemp("windowed"), window=WINDOW, repeat=6)


async def lose(engine: Engine, workers: FakeWorkers) -> None:
    workers.started[-1].die("was killed by SIGSEGV")


async def sleep_and_wake(level: int, engine: Engine, workers: FakeWorkers) -> None:
    await engine.sleep(level, "keep")
    await trio.sleep(10 * STEP)
    await engine.wake()


async def migrate(engine: Engine, workers: FakeWorkers) -> None:
    await engine.reload()


@pytest.mark.parametrize("speculate", [0, 4])
@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(lose, id="lost"),
        pytest.param(partial(sleep_and_wake, 1), id="slept-1"),
        pytest.param(partial(sleep_and_wake, 3), id="slept-3"),
        pytest.param(migrate, id="reloaded"),
    ],
)
async def test_texts_beyond_the_pool_are_right(
    clock: MockClock, opened: Open, script: ScriptedSettings, disturb: Disturbance, speculate: int
) -> None:
    """Three texts of 261 tokens each in blocks for 55 tokens: as many as one of them needs."""
    results: dict[int, list[int]] = {}

    async def one(number: int) -> None:
        results[number] = tokens_of(await collect(engine, PROMPTS[number], ASKED[number]))

    options = {"block_size": BLOCK, "num_blocks": most_blocks(WINDOW, TOKENS, BLOCK), "speculate": speculate}
    limits = {"max_num_batched_tokens": TOKENS, "max_bs": 3, "shutdown_timeout": 20.0}
    async with opened(**options, **limits) as (engine, workers):
        async with trio.open_nursery() as nursery:
            for number in range(len(PROMPTS)):
                nursery.start_soon(one, number)
            await trio.sleep(15.5 * STEP)
            await disturb(engine, workers)
        await trio.testing.wait_all_tasks_blocked()
        assert engine.statistics().kv_blocks_used == 0
    expected = [scripted_tokens(*asked, COUNT, script) for asked in zip(PROMPTS, ASKED, strict=True)]
    assert [results[number] for number in range(len(PROMPTS))] == expected


async def test_a_second_turn_finds_what_its_window_needs(clock: MockClock, opened: Open) -> None:
    """Though the beginning of the first one is lost by then."""
    options = {"block_size": BLOCK, "num_blocks": 20, "max_num_batched_tokens": TOKENS, "max_bs": 3}
    async with opened(**options) as (engine, _):
        first = tokens_of(await collect(engine, PROMPTS[0], SamplingParams(temperature=0, max_tokens=10)))
        outputs = await collect(engine, [*PROMPTS[0], *first, 5], SamplingParams(temperature=0, max_tokens=1))
        assert outputs[-1].num_cached_tokens == (len(PROMPTS[0]) + 9) // BLOCK * BLOCK
