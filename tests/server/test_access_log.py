"""``--access-log``: one line per request, with numbers and no texts."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import trio
from fake_engine import FakeEngine, serving

CHAT = {"messages": [{"role": "user", "content": "SECRET"}], "max_tokens": 5}


class Lines(logging.Handler):
    """Keeps the lines of the access log, and tells of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.came = trio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.came.set()

    async def only(self) -> dict[str, Any]:
        """Return the values of the one line, once it is there."""
        with trio.fail_after(5):
            await self.came.wait()
        (record,) = self.records
        return vars(record)


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger, kept = logging.getLogger("ullm.server.access_log"), Lines()
    logger.addHandler(kept)
    logger.setLevel("INFO")
    yield kept
    logger.removeHandler(kept)
    logger.setLevel(logging.NOTSET)


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(engine, access_log=True) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            yield client


@pytest.mark.parametrize("stream", [False, True])
async def test_a_line_has_id_path_status_tokens_and_seconds(
    client: httpx.AsyncClient, lines: Lines, stream: bool
) -> None:
    body = {**CHAT, "stream": stream, "stream_options": {"include_usage": True} if stream else None}
    answer = await client.post("/v1/chat/completions?key=SECRET", json=body, headers={"X-Request-Id": "r1"})
    assert answer.status_code == 200
    line = await lines.only()
    assert (line["request_id"], line["path"], line["status"]) == ("r1", "/v1/chat/completions", 200)
    if not stream:
        usage = answer.json()["usage"]
        assert line["prompt_tokens"] == usage["prompt_tokens"] > 0
        assert line["completion_tokens"] == usage["completion_tokens"] > 0
    assert line["completion_tokens"] > 0
    assert 0 <= line["seconds"] < 60
    assert "client" not in line
    assert "SECRET" not in str(line)


async def test_an_error_has_a_line_without_tokens(client: httpx.AsyncClient, lines: Lines) -> None:
    answer = await client.get("/nothing%0Ahere/" + "x" * 500)
    line = await lines.only()
    assert line["status"] == answer.status_code == 404
    assert line["request_id"] == answer.headers["X-Request-Id"]
    assert line["path"].startswith("/nothing%0Ahere/")
    assert len(line["path"]) == 200
    assert "completion_tokens" not in line


async def test_a_client_that_leaves_has_a_line(
    client: httpx.AsyncClient, engine: FakeEngine, lines: Lines
) -> None:
    engine.hold_after = 2
    body = {**CHAT, "stream": True, "max_tokens": 50}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200  # it has begun, and waits for its third token
    line = await lines.only()
    assert line["status"] == 200
    assert line["completion_tokens"] <= 2
    assert line["client"] == "left before the end"


async def test_without_the_option_there_is_none(lines: Lines) -> None:
    async with serving(FakeEngine()) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/v1/models")).status_code == 200
    assert not lines.records
