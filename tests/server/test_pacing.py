"""Paced readers, which get several tokens together, on a virtual clock with one step per second."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import trio
from trio.testing import MockClock

from tests.support.engine import PROMPT, Open
from ullm.engine import Engine
from ullm.engine.output import Output
from ullm.protocol.messages import Step
from ullm.sampling import SamplingParams
from ullm.server.http.pacing import EVENTS_PER_SECOND, UNPACED_STREAMS, Pacer, unhurried
from ullm.testing import FakeBehaviour

TEN = SamplingParams(temperature=0, max_tokens=10)


async def read(
    engine: Engine, pace: Callable[[], float] | None, params: SamplingParams = TEN
) -> list[tuple[float, Output]]:
    """Each output with its time, the first one's being 1."""
    async with engine.generate(PROMPT, params, pace=pace) as generation:
        outputs = [(trio.current_time(), output) async for output in generation]
        return [(1 + at - outputs[0][0], output) for at, output in outputs]


def shape(outputs: list[tuple[float, Output]]) -> list[tuple[int, int]]:
    """Return times, to the nearest second, and numbers of tokens."""
    return [(round(at), len(output.token_ids)) for at, output in outputs]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, [(second, 1) for second in range(1, 11)]),
        (0.5, [(second, 1) for second in range(1, 11)]),
        (2.5, [(1, 1), (4, 3), (7, 3), (10, 3)]),
        (5.5, [(1, 1), (7, 6), (10, 3)]),
        (math.inf, [(1, 1), (10, 9)]),
    ],
)
async def test_the_first_and_the_last_token_never_wait(
    clock: MockClock, opened: Open, seconds: float, expected: list[tuple[int, int]]
) -> None:
    async with opened(FakeBehaviour(step_seconds=1)) as (engine, _):
        plain = await read(engine, None)
        paced = await read(engine, lambda: seconds)
    assert shape(paced) == expected
    assert "".join(output.text for _, output in paced) == "".join(output.text for _, output in plain)
    assert paced[-1][1].finish_reason == "length"
    assert paced[-1][1].num_generated_tokens == 10


async def test_tokens_do_not_wait_for_ever_for_others(clock: MockClock, opened: Open) -> None:
    """Tokens that are held back when a worker hangs are read after twice the pace."""
    steps = 0

    def fourth_step(message: object) -> bool:
        nonlocal steps
        steps += isinstance(message, Step)
        return isinstance(message, Step) and steps == 4

    async with opened(FakeBehaviour(step_seconds=1, hang_on=fourth_step)) as (engine, _):
        paced = await read(engine, lambda: 2.5)
    assert shape(paced)[:2] == [(1, 1), (6, 1)]


async def test_the_deadline_of_a_request_does_not_wait(clock: MockClock, opened: Open) -> None:
    params = SamplingParams(temperature=0, max_tokens=10, timeout=4.5)
    async with opened(FakeBehaviour(step_seconds=1)) as (engine, _):
        (first, *_, last) = await read(engine, unhurried, params)
    assert first[1].num_generated_tokens == 1
    assert 1.5 < last[0] < 4.6
    assert last[1].finish_reason == "timeout"
    assert last[1].num_generated_tokens > 1


async def test_nothing_waits_where_a_stop_string_may_come(clock: MockClock, opened: Open) -> None:
    """Otherwise tokens would be computed after the stop string."""
    params = SamplingParams(temperature=0, max_tokens=10, stop="not to be found")
    async with opened(FakeBehaviour(step_seconds=1)) as (engine, _):
        assert len(await read(engine, unhurried, params)) == 10


async def test_choices_are_read_together(clock: MockClock, opened: Open) -> None:
    params = SamplingParams(temperature=0, max_tokens=10, n=2)
    async with opened(FakeBehaviour(step_seconds=1)) as (engine, _):
        paced = await read(engine, lambda: 2.5, params)
    assert {round(at) for at, _ in paced} == {1, 4, 7, 10}
    assert [sum(len(o.token_ids) for _, o in paced if o.index == index) for index in range(2)] == [10, 10]


async def test_a_wait_ends_at_its_deadline(clock: MockClock, opened: Open) -> None:
    async with opened(FakeBehaviour(step_seconds=10)) as (engine, _):
        async with engine.generate(PROMPT, TEN) as generation:
            began = trio.current_time()
            assert await generation.next(began + 3) is None
            assert trio.current_time() - began == pytest.approx(3, abs=0.1)
            output = await generation.next(began + 30)
            assert output is not None
            assert len(output.token_ids) == 1


def test_few_streams_are_not_paced() -> None:
    pacer = Pacer()
    with ExitStack() as stack:
        for _ in range(UNPACED_STREAMS):
            stack.enter_context(pacer.stream())
        assert pacer.interval() == 0
        with pacer.stream():
            assert pacer.interval() == 1 / EVENTS_PER_SECOND
        assert pacer.interval() == 0
    assert pacer.streams == 0
