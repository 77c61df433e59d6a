"""The longest hold of the event loop is measured, and shown."""

from __future__ import annotations

import time

import trio
from trio.testing import MockClock

from tests.support.engine import Open, collect
from ullm.engine.loop_holds import LoopHolds


async def test_what_a_task_holds_the_loop_for_is_measured() -> None:
    now = 0.0
    holds = LoopHolds(clock=lambda: now)
    with holds.watching():
        await trio.sleep(0.001)
        assert (holds.longest, holds.long) == (0, 0)
        for seconds, longest, long in ((0.08, 0.08, 0), (0.3, 0.3, 1), (0.2, 0.3, 2)):
            now += seconds
            await trio.sleep(0.001)
            assert (round(holds.longest, 6), holds.long) == (longest, long)
    now += 5
    await trio.sleep(0.001)
    with holds.watching():
        await trio.sleep(0.001)
    assert holds.longest < 1


async def test_an_engine_tells_its_longest_hold(clock: MockClock, opened: Open) -> None:
    async with opened() as (engine, _):
        await collect(engine)
        assert 0 < engine.statistics().loop_hold_seconds
        time.sleep(0.11)  # noqa: ASYNC251  # what no task should do
        await collect(engine)
        assert engine.statistics().loop_hold_seconds >= 0.11
        assert engine.statistics().loop_holds_total >= 1
