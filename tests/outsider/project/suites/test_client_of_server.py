"""A client of a server, on asyncio, by two plugins and without one."""

import asyncio
import json

import anyio
import pytest

from ullm.testing import assert_finished_once, assert_same_text

BODY = {"model": "m", "prompt": [300, 301], "max_tokens": 30, "temperature": 0}


async def ask(server, read=None, **more):
    """A client of few lines: HTTP by hand over asyncio's streams."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps({**BODY, **more}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Length: {len(content)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    try:
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


def text_of(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"]


@pytest.mark.asyncio
async def test_a_crash_costs_a_pause(served, ullm_faults):
    undisturbed = text_of(await ask(served))
    ullm_faults.arm("worker.step:crash@nth=10")
    assert_same_text(undisturbed, text_of(await ask(served)))


@pytest.mark.anyio
async def test_many_at_once_on_anyio(served, ullm_faults):
    ullm_faults.arm("worker.step:crash@nth=10")
    texts = []

    async def one():
        texts.append(text_of(await ask(served)))

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(one)
    assert len(set(texts)) == 1


@pytest.mark.asyncio
async def test_a_refusal_between_server_and_client(served, ullm_faults):
    ullm_faults.arm("http.request:refuse@status=429,retry_after=3")
    refused = await ask(served)
    assert refused.startswith(b"HTTP/1.1 429")
    assert b"retry-after: 3" in refused.lower()


@pytest.mark.asyncio
async def test_a_stream_that_ends_without_a_finish(served, ullm_faults):
    ullm_faults.arm("http.chunk:end@nth=3")
    stream = await ask(served, stream=True)
    assert b"[DONE]" not in stream
    assert stream.count(b"data: ") == 2


def test_without_an_event_loop(ullm_server):
    server = ullm_server("--served-model-name", "m")
    server.faults.arm("worker.step:crash@nth=5")
    status, answer = server.request("POST", "/v1/completions", BODY)
    assert status == 200
    assert_finished_once([answer], "length")
