"""What a request takes is free when it ends: nothing waits for a collection of garbage.

A server of many streams looks for garbage seldom, because each look goes through all streams. What only a
collection frees would be megabytes by then: 11 KB per request were measured.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_engine import serving

from tests.benchmarks.soak.mix import Ask, run_ask
from ullm.client.http import Connection, Endpoint
from ullm.config import EngineConfig
from ullm.engine import open_engine
from ullm.testing import write_scripted_model

pytestmark = pytest.mark.process

REQUESTS = 5
TEXT = {"prompt": "one two three", "max_tokens": 6, "stream": True, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 6, "stream": True, "n": 2}
ASKS = [
    Ask("streamed", "/completions", TEXT),
    Ask("whole", "/completions", TEXT | {"stream": False}),
    Ask("chat", "/chat/completions", CHAT),
    Ask("leaves early", "/completions", TEXT | {"max_tokens": 500}, leave_after=1),
    Ask("wrong", "/completions", TEXT | {"max_tokens": -1}, status=400),
]


@pytest.fixture
async def endpoint(tmp_path: Path) -> AsyncIterator[Endpoint]:
    model = write_scripted_model(tmp_path / "model", step_seconds=0.001)
    config = EngineConfig(
        model=str(model), load_format="dummy", runner="ullm.testing:ScriptedRunner", transport="thread"
    )
    async with open_engine(config) as engine:
        found: Any = engine
        async with serving(found) as url:
            yield Endpoint.parse(f"{url}/v1")


@contextmanager
def no_collections() -> Iterator[Counter[str]]:
    """Counts objects of ullm's types that only the garbage collector would free."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.update(type(each).__name__ for each in gc.garbage if _is_ours(each))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def _is_ours(each: object) -> bool:
    return type(each).__module__.startswith(("ullm.", "hypercorn.", "quart"))


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: ask.kind)
async def test_a_request_leaves_no_garbage(endpoint: Endpoint, ask: Ask) -> None:
    connection = Connection(Endpoint("http", endpoint.host, endpoint.port, ""))

    async def work() -> None:
        for _ in range(REQUESTS):
            await run_ask(
                connection,
                Ask(ask.kind, ask.path, ask.body | {"model": "model"}, ask.leave_after, ask.status),
            )
        await connection.aclose()

    await work()  # what is made once is made
    with no_collections() as garbage:
        await work()
    assert garbage == {}
