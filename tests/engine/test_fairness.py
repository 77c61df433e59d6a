"""Nobody starves beside a client that sends many requests, or one with many choices."""

from __future__ import annotations

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.engine import PROMPT, Open
from ullm.engine import Engine
from ullm.sampling import SamplingParams

SHORT = SamplingParams(temperature=0, max_tokens=4)


async def run(
    engine: Engine, nursery: trio.Nursery, order: list[str], client: str, params: SamplingParams = SHORT
) -> None:
    """Submit a request, and note the client whenever one of its choices ends."""

    async def one(*, task_status: trio.TaskStatus[None]) -> None:
        async with engine.generate(PROMPT, params, client=client) as generation:
            task_status.started()
            async for output in generation:
                if output.finish_reason is not None:
                    order.append(client)

    await nursery.start(one)


async def test_clients_take_turns(clock: MockClock, opened: Open) -> None:
    order: list[str] = []
    async with opened(max_bs=1) as (engine, _), trio.open_nursery() as nursery:
        for _ in range(4):
            await run(engine, nursery, order, "greedy")
        await wait_all_tasks_blocked()
        await trio.sleep(1.5)
        for _ in range(2):
            await run(engine, nursery, order, "modest")
    assert order == ["greedy", "modest", "greedy", "modest", "greedy", "greedy"]


async def test_choices_are_turns_too(clock: MockClock, opened: Open) -> None:
    order: list[str] = []
    async with opened(max_bs=1) as (engine, _), trio.open_nursery() as nursery:
        await run(engine, nursery, order, "greedy", SamplingParams(n=6, seed=1, max_tokens=4))
        await trio.sleep(1.5)
        await run(engine, nursery, order, "modest")
    assert order.index("modest") == 1


async def test_without_clients_the_order_is_that_of_arrival(clock: MockClock, opened: Open) -> None:
    order: list[str] = []

    async def one(name: str) -> None:
        async with engine.generate(PROMPT, SHORT, request_id=name) as generation:
            async for _ in generation:
                pass
        order.append(name)

    async with opened(max_bs=1) as (engine, _), trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(one, str(number))
            await wait_all_tasks_blocked()
    assert order == ["0", "1", "2", "3", "4"]
