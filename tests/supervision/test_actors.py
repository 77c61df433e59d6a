"""Actors with mailboxes under a supervisor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ullm.supervision import ChildSpec, cleanup_scope, open_supervisor
from ullm.supervision.actor import Mailbox, Reply, ask
from ullm.supervision.errors import ActorLost


@dataclass(frozen=True)
class Add:
    number: int
    reply: Reply[int]


class Counter:
    """Sums up what it is told; crashes at 13, and does not answer to 7."""

    def __init__(self) -> None:
        self.mailbox = Mailbox[Add](10, "counter")
        self.total = 0

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        self.total = 0
        task_status.started()
        try:
            async for message in self.mailbox:
                if message.number == 13:
                    raise ValueError("thirteen")
                self.total += message.number
                if message.number != 7:
                    message.reply.send(self.total)
        finally:
            with cleanup_scope():
                await trio.lowlevel.checkpoint()

    async def add(self, number: int) -> int:
        return await ask(self.mailbox, lambda reply: Add(number, reply), 100.0)


async def test_a_crash_fails_what_it_had_taken_and_the_next_life_serves_the_rest(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    counter = Counter()
    results: dict[int, Any] = {}

    async def add(number: int) -> None:
        try:
            results[number] = await counter.add(number)
        except ActorLost as error:
            results[number] = str(error)

    began = trio.current_time()
    async with open_supervisor("root", [ChildSpec("counter", counter.run)]) as supervisor:
        assert await counter.add(1) == 1
        for number in (7, 13, 20):
            nursery.start_soon(add, number)
            await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked()
        assert supervisor.which_children()[0].restarts == 1
    assert results == {
        7: "counter ended before it answered",
        13: "counter ended before it answered",
        20: 20,
    }
    assert trio.current_time() == began


async def test_the_stop_fails_open_questions_at_once(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    counter = Counter()
    lost: list[float] = []

    async def forgotten() -> None:
        with pytest.raises(ActorLost):
            await counter.add(7)
        lost.append(trio.current_time())

    async with open_supervisor("root", [ChildSpec("counter", counter.run)]) as supervisor:
        nursery.start_soon(forgotten)
        await wait_all_tasks_blocked()
        await supervisor.stop()
        await wait_all_tasks_blocked()
        assert lost == [trio.current_time()]
