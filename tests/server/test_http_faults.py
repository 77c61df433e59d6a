"""Faults between server and client: what a client gets, and what the history says of it."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest
import trio
from fake_engine import FakeEngine

from ullm.errors import FaultInjected
from ullm.faults import FaultInjector
from ullm.server.http.faulty import FaultyHttp

pytestmark = pytest.mark.process

BODY = {"model": "fake", "prompt": "x", "max_tokens": 12, "stream": True}


@pytest.fixture
def faults(engine: FakeEngine) -> FaultInjector:
    injector = FaultInjector()
    engine.faults = injector  # type: ignore[assignment]
    return injector


@pytest.fixture
async def served(engine: FakeEngine, faults: FaultInjector, client: httpx.AsyncClient) -> httpx.AsyncClient:
    return client


async def read(client: httpx.AsyncClient, **headers: str) -> tuple[bytes, bool]:
    """Return what came of a stream, and whether it ended in order."""
    data = b""
    try:
        async with client.stream("POST", "/v1/completions", json=BODY, headers=headers) as answer:
            assert answer.status_code == 200
            async for piece in answer.aiter_bytes():
                data += piece
    except httpx.TransportError:
        return data, False
    return data, True


def events(data: bytes) -> list[bytes]:
    return [event for event in data.split(b"\n\n") if event]


async def test_nothing_happens_to_what_is_not_meant(served: httpx.AsyncClient, faults: FaultInjector) -> None:
    undisturbed, whole = await read(served)
    assert whole
    assert undisturbed.endswith(b"data: [DONE]\n\n")
    faults.arm("http.chunk:reset@nth=1000; http.request:refuse@request=other")
    assert len(events((await read(served))[0])) == len(events(undisturbed))
    assert not faults.history
    assert (await served.get("/ready")).status_code == 200


@pytest.mark.parametrize(
    ("plan", "status", "wait"),
    [
        ("http.request:refuse", 503, None),
        ("http.request:refuse@status=429,retry_after=7", 429, "7"),
        ("http.request:refuse@status=500", 500, None),
        ("http.request:refuse@status=502,retry_after=0", 502, "0"),
    ],
)
async def test_a_request_is_refused(
    served: httpx.AsyncClient, faults: FaultInjector, plan: str, status: int, wait: str | None
) -> None:
    faults.arm(plan)
    answer = await served.post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, wait)
    assert answer.json()["error"]["code"] == "injected_fault"
    assert [fired.effect for fired in faults.history] == [f"refused with {status}"]
    assert (await read(served))[1], "once, and on the same connection"


async def test_the_first_byte_is_slow(served: httpx.AsyncClient, faults: FaultInjector) -> None:
    faults.arm("http.request:slow@seconds=0.2,request=mine")
    with pytest.raises(httpx.ReadTimeout):
        await served.post("/v1/completions", json=BODY, timeout=0.1, headers={"X-Request-Id": "mine"})
    assert [(fired.request, fired.effect) for fired in faults.history] == [("mine", "waits 0.2 s")]


async def test_a_connection_is_reset_before_the_answer(
    served: httpx.AsyncClient, faults: FaultInjector
) -> None:
    faults.arm("http.request:reset")
    with pytest.raises(httpx.ReadError):
        await served.post("/v1/completions", json=BODY)
    assert [fired.effect for fired in faults.history] == ["connection reset"]


async def test_a_stream_is_reset_after_n_chunks(served: httpx.AsyncClient, faults: FaultInjector) -> None:
    faults.arm("http.chunk:reset@nth=3")
    data, whole = await read(served)
    assert not whole
    assert len(events(data)) <= 2, "the kernel may drop what a reset overtakes"
    assert [fired.hit for fired in faults.history] == [3]


async def test_a_stream_ends_cleanly_without_a_finish(
    served: httpx.AsyncClient, faults: FaultInjector
) -> None:
    faults.arm("http.chunk:end@token=3,request=mine")
    await read(served)
    data, whole = await read(served, **{"X-Request-Id": "mine"})
    assert whole
    assert len(events(data)) == 2
    assert b'finish_reason":"' not in data
    assert b"[DONE]" not in data
    assert [(fired.request, fired.token) for fired in faults.history] == [("mine", 3)]


@pytest.mark.parametrize("action", ["end", "error"])
async def test_a_connection_that_is_to_be_closed_then_is(
    served: httpx.AsyncClient, faults: FaultInjector, action: str
) -> None:
    faults.arm(f"http.chunk:{action}@nth=2")
    stream = await trio.open_tcp_stream("127.0.0.1", served.base_url.port or 0)
    content = msgspec.json.encode(BODY)
    head = f"Host: localhost\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
    kind = "Content-Type: application/json\r\n\r\n"
    request = f"POST /v1/completions HTTP/1.1\r\n{head}{kind}".encode() + content
    async with stream:
        await stream.send_all(request)
        with trio.fail_after(5):
            data = b"".join([piece async for piece in stream])
    assert data.endswith(b"0\r\n\r\n")


async def test_half_an_event(served: httpx.AsyncClient, faults: FaultInjector) -> None:
    faults.arm("http.chunk:half@nth=1")
    data, whole = await read(served)
    assert not whole
    assert b"\n\n" not in data


async def test_an_error_event_after_n_tokens(served: httpx.AsyncClient, faults: FaultInjector) -> None:
    faults.arm("http.chunk:error@nth=4")
    data, whole = await read(served)
    assert whole
    assert b"injected fault: error at http.chunk" in events(data)[3]
    assert events(data)[4:] == [b"data: [DONE]"]


async def test_a_chunk_is_late(served: httpx.AsyncClient, faults: FaultInjector) -> None:
    faults.arm("http.chunk:slow@nth=2,seconds=0.01")
    assert (await read(served))[1]
    assert [fired.effect for fired in faults.history] == ["waits 0.01 s"]


async def test_requests_that_were_cut_leave_nothing(
    served: httpx.AsyncClient, faults: FaultInjector, engine: FakeEngine
) -> None:
    faults.arm("http.chunk:reset@nth=2,times=5")
    for _ in range(5):
        assert not (await read(served))[1]
    assert (await read(served))[1]


async def test_a_server_that_cannot_reset_has_the_application_fail() -> None:
    """What other ASGI servers do then is to close the connection."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it is not asked")

    faulty = FaultyHttp(app, FaultInjector.from_text("http.request:reset"), lambda path: True)
    scope = {"type": "http", "path": "/v1/completions", "headers": []}
    with pytest.raises(FaultInjected, match="this server cannot reset a connection"):
        await faulty(scope, None, None)
