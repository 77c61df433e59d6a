"""Readers of requests: when one is woken, and when a stop may go on."""

from __future__ import annotations

import math

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.engine.readers import Readers, WakeUpCall


async def test_a_reader_is_woken_by_tokens_after_its_quiet_time_and_by_every_end(
    autojump_clock: MockClock,
) -> None:
    call, woken = WakeUpCall(), []

    async def read() -> None:
        woken.append(await call.wait(math.inf))

    call.quiet_until = 4.0
    for count, time in enumerate((4.0, math.inf)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            call.notify(3.9)
            await wait_all_tasks_blocked()
            assert len(woken) == count
            call.notify(time)
    assert woken == [True, True]


async def test_a_reader_waits_until_its_deadline(autojump_clock: MockClock) -> None:
    call = WakeUpCall()
    call.notify(math.inf)  # nobody waits: what came before is seen without waiting
    assert not await call.wait(trio.current_time() + 2)
    assert trio.current_time() == 2


async def test_all_readers_are_waited_for(autojump_clock: MockClock) -> None:
    readers = Readers()
    await readers.wait_none()
    readers.enter()
    readers.enter()
    with trio.move_on_after(1) as scope:
        await readers.wait_none()
    assert scope.cancelled_caught
    readers.leave()
    readers.leave()
    await readers.wait_none()
