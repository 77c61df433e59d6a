"""Five hundred streams at once through the real server: all complete, all right, memory flat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
import trio

from tests.support.server import SCRIPTED, Server
from ullm.client.http import Connection, Endpoint
from ullm.testing import write_scripted_model

pytestmark = pytest.mark.process

STREAMS = 500
TOKENS = 40


async def read_stream(endpoint: Endpoint, number: int, texts: dict[int, str]) -> None:
    connection = Connection(endpoint)
    body = {"prompt": [300 + number % 150], "max_tokens": TOKENS, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    text, reasons, usage = "", [], None
    async with connection.events("/completions", body) as events:
        async for payload in events:
            chunk = msgspec.json.decode(payload)
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["text"]
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    await connection.aclose()
    assert reasons == ["length"]
    assert usage["completion_tokens"] == TOKENS
    assert texts.setdefault(number % 150, text) == text, "the same prompt has the same text"


def run_all(server: Server) -> dict[int, str]:
    texts: dict[int, str] = {}

    async def main() -> None:
        endpoint = Endpoint.parse(server.url)
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                for number in range(STREAMS):
                    nursery.start_soon(read_stream, endpoint, number, texts)

    trio.run(main)
    return texts


@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_five_hundred_streams_are_complete_and_memory_stays_flat(
    serve: Callable[..., Server], tmp_path: Path, rounds: int
) -> None:
    model = write_scripted_model(tmp_path / "model", step_seconds=0.002, num_blocks=4096)
    server = serve("--model", str(model), *SCRIPTED, "--max-bs", "512", "--max-num-batched-tokens", "2048")
    process = psutil.Process(server.process.pid)
    first = run_all(server)
    resident = process.memory_info().rss
    for _ in range(rounds):
        assert run_all(server) == first
    assert process.memory_info().rss - resident < 16 << 20
    with server.client() as client:
        metrics = client.get("/metrics").text
    assert "ullm_requests_running 0.0" in metrics or "ullm_num_requests_running 0.0" in metrics
    assert len({text for text in first.values()}) > 100
