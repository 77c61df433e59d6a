"""Streams with pauses, on a virtual clock."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from asgi_call import Answer, call
from fake_engine import ANSWER, FakeEngine
from trio.testing import MockClock

from ullm.config import ServerConfig
from ullm.errors import EngineDead
from ullm.server import create_app

COMMENT = ": keep-alive"
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "hi", "max_tokens": 100}),
    ("/v1/completions", {"prompt": "hi", "max_tokens": 100, "n": 3}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 100}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "n": 2}),
]


@pytest.fixture
def engine() -> FakeEngine:
    """An engine that pauses after its third token until it is released."""
    engine = FakeEngine()
    engine.hold_after = 3
    return engine


async def ask(engine: FakeEngine, path: str, silence: float, **body: Any) -> Answer:
    """Return the answer of an engine that pauses for ``silence`` seconds."""
    app = create_app(engine, ServerConfig(sse_keep_alive=10))

    async def release() -> None:
        await trio.sleep(silence)
        engine.release.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(release)
        return await call(app, path, body)
    raise AssertionError("the nursery swallows nothing")


def texts(events: list[str]) -> dict[int, str]:
    """Return the text of each choice."""
    found: dict[int, str] = {}
    for event in events:
        if event.startswith("data: {"):
            for choice in json.loads(event.removeprefix("data: "))["choices"]:
                more = choice.get("text") or choice.get("delta", {}).get("content") or ""
                found[choice["index"]] = found.get(choice["index"], "") + more
    return found


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("hold_after", [0, 3])
async def test_a_comment_for_each_silence(
    engine: FakeEngine, path: str, body: dict[str, Any], hold_after: int, autojump_clock: MockClock
) -> None:
    engine.hold_after = hold_after
    answer = await ask(engine, path, 35, **body, stream=True)
    assert answer.status == 200
    assert [at for at, piece in answer.pieces if piece.startswith(b":")] == [10, 20, 30]
    assert answer.events[-1] == "data: [DONE]"
    choices = body.get("n", 2 if isinstance(body.get("prompt"), list) else 1)
    assert list(texts(answer.events).values()) == [ANSWER] * choices


async def test_no_comment_without_a_silence(engine: FakeEngine, autojump_clock: MockClock) -> None:
    answer = await ask(engine, "/v1/completions", 9, prompt="hi", max_tokens=100, stream=True)
    assert COMMENT not in answer.events
    assert answer.events[-1] == "data: [DONE]"


async def test_no_comment_in_a_unary_answer(engine: FakeEngine, autojump_clock: MockClock) -> None:
    answer = await ask(engine, "/v1/completions", 35, prompt="hi", max_tokens=100)
    assert answer.json()["choices"][0]["text"] == ANSWER


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_a_failure_after_a_comment_is_an_event(
    engine: FakeEngine, path: str, body: dict[str, Any], autojump_clock: MockClock
) -> None:
    """The status went out with the comment."""
    engine.hold_after, engine.fail_after = 0, 1
    engine.failure = EngineDead("the engine has failed: replica0.rank0 was killed by SIGKILL")
    answer = await ask(engine, path, 15, **body, stream=True)
    assert answer.status == 200
    assert answer.events[0] == COMMENT
    assert answer.events[-1] == "data: [DONE]"
    error = json.loads(answer.events[-2].removeprefix("data: "))["error"]
    assert error["code"] == "engine_dead"
    assert "SIGKILL" in error["message"]
    assert not engine.active


async def test_a_failure_before_a_comment_has_its_status(
    engine: FakeEngine, autojump_clock: MockClock
) -> None:
    engine.fail_after, engine.failure = 0, EngineDead("gone")
    answer = await ask(engine, "/v1/completions", 15, prompt="hi", stream=True)
    assert answer.status == 500
    assert answer.headers["content-type"] == "application/json"
