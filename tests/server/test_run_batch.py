"""Batches on a fake engine: an answer per line, errors per line, places, and what an earlier run has done."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import trio
from fake_engine import ANSWER, FakeEngine

from ullm.cli.batch_lines import read_output
from ullm.cli.run_batch import PAUSE, Tally, answer_lines
from ullm.config import ServerConfig
from ullm.errors import QueueFull, ResourceUnavailable
from ullm.server import create_app

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def line(custom_id: Any, url: str = CHAT, body: Any = HELLO, **others: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **others}).encode()


async def run(
    engine: FakeEngine, lines: list[bytes], *, concurrency: int = 4, known: frozenset[str] = frozenset()
) -> tuple[dict[str | None, Any], Tally]:
    output, tally = io.BytesIO(), Tally()
    app = create_app(engine, ServerConfig(port=0), local=True)
    await answer_lines(app, lines, output, tally, concurrency, known)
    found = [json.loads(each) for each in output.getvalue().splitlines()]
    assert len({each["id"] for each in found}) == len(found) == tally.done
    return {each["custom_id"]: each for each in found}, tally


async def test_every_route(engine: FakeEngine) -> None:
    bodies: dict[str, Any] = {
        CHAT: HELLO,
        "/v1/completions": {"prompt": "Hello", "max_tokens": 99},
        "/v1/embeddings": {"input": "Hello"},
        "/v1/responses": {"input": "Hello"},
        "/v1/messages": {**HELLO, "max_tokens": 99},
        "/v1/score": {"text_1": "a", "text_2": "b"},
        "/v1/rerank": {"query": "a", "documents": ["b"]},
    }
    found, tally = await run(engine, [line(url, url, body) for url, body in bodies.items()])
    assert (tally.done, tally.failed) == (len(bodies), 0)
    for each in found.values():
        assert each["error"] is None
        assert each["response"]["status_code"] == 200
        assert each["response"]["request_id"]
    assert found[CHAT]["response"]["body"]["choices"][0]["message"]["content"] == ANSWER
    assert found["/v1/embeddings"]["response"]["body"]["data"][0]["embedding"]


async def test_errors_are_those_of_their_line(engine: FakeEngine) -> None:
    lines = [
        b"nonsense",
        b"[1]",
        line(7),
        line("method", method="GET"),
        line("url", "/v1/models"),
        line("stream", body={**HELLO, "stream": True}),
        line("background", "/v1/responses", {"input": "x", "background": True}),
        line("fine"),
        b"",
        line("fine"),
        line("refused", body={**HELLO, "temperature": -1}),
        line("model", body={**HELLO, "model": "other"}),
    ]
    output, tally = io.BytesIO(), Tally()
    await answer_lines(create_app(engine, ServerConfig(port=0), local=True), lines, output, tally, 1)
    found = [json.loads(each) for each in output.getvalue().splitlines()]
    errors = {each["error"]["message"] for each in found if each["error"]}
    for number, words in {
        1: "is not JSON",
        2: "Expected `object`",
        3: "custom_id",
        4: "GET",
        5: "/v1/models",
        6: "stream",
        7: "background",
        10: "came before",
    }.items():
        assert any(f"line {number}" in each and words in each for each in errors), (number, errors)
    statuses = {each["custom_id"]: each["response"]["status_code"] for each in found if each["response"]}
    assert statuses == {"fine": 200, "refused": 400, "model": 404}
    refused = next(each for each in found if each["custom_id"] == "refused")
    assert refused["response"]["body"]["error"]["param"] == "temperature"
    assert (tally.done, tally.failed) == (11, 10)


async def test_no_more_than_the_places(engine: FakeEngine) -> None:
    most = 0

    def script(index: int) -> list[int]:
        nonlocal most
        most = max(most, len(engine.active))
        return engine._tokenizer.plain(ANSWER)

    engine.script = script
    found, _ = await run(engine, [line(str(number)) for number in range(20)], concurrency=3)
    assert len(found) == 20
    assert most == 3


async def test_a_full_queue_is_waited_for(engine: FakeEngine, autojump_clock: Any) -> None:
    engine.refuse = QueueFull(8, 8, retry_after=1.0)

    async with trio.open_nursery() as nursery:

        async def make_room() -> None:
            await trio.sleep(3 * PAUSE)
            engine.refuse = None

        nursery.start_soon(make_room)
        found, tally = await run(engine, [line("a"), line("b")])
    assert tally.failed == 0
    assert len(found) == 2


async def test_what_was_answered_before_is_left_out(engine: FakeEngine) -> None:
    found, tally = await run(engine, [line("a"), line("b")], known=frozenset({"a"}))
    assert list(found) == ["b"]
    assert tally.done == 1


def test_the_output_of_an_earlier_run(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fine = b'{"custom_id": "a", "response": {"status_code": 200}}\n'
    refused = b'{"custom_id": "b", "response": {"status_code": 400}}\n'
    invalid = b'{"custom_id": null, "response": null, "error": {}}\n'
    path.write_bytes(fine + refused + invalid + b'{"custom_id": "c", "resp')
    earlier = read_output(path)
    assert (earlier.done, earlier.size) == ({"a"}, len(fine + refused + invalid))
    path.write_bytes(fine + b"something else\n")
    with pytest.raises(ResourceUnavailable, match="line 2"):
        read_output(path)
