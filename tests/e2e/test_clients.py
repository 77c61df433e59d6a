"""What clients do to a real server: leaving, hurrying, crowding, and asking for nonsense."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.support.server import SCRIPTED, Serve, Server, starting_servers
from tests.support.streams import Stream, streams, texts
from tests.support.waiting import eventually
from ullm.client.http import Connection, Endpoint

pytestmark = pytest.mark.process

STEP_SECONDS = 0.25


def is_idle(server: Server) -> bool:
    """Whether no request is in flight and no block in use."""
    found = [server.metric(f"ullm_num_requests_{state}") for state in ("running", "waiting")]
    return found == [0, 0] and server.metric("ullm_kv_cache_usage_ratio") == 0


@pytest.fixture(scope="module")
def slow_server(scripted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its steps are long enough to be told apart from outside."""
    environ = {"ULLM_SCRIPTED_STEP_SECONDS": str(STEP_SECONDS)}
    with starting_servers() as start:
        yield start("--model", str(scripted_model), *SCRIPTED, environ=environ)


@pytest.mark.parametrize("chat", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.timing
def test_blocks_are_free_within_a_step_of_a_disconnect(slow_server: Server, stream: bool, chat: bool) -> None:
    where = "chat/completions" if chat else "completions"
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    body = {**asked, "max_tokens": 500, "ignore_eos": True, "stream": stream}

    async def leave_soon() -> float:
        async with httpx.AsyncClient(timeout=30) as client:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(lambda: client.post(f"{slow_server.url}/v1/{where}", json=body))
                    await trio.to_thread.run_sync(eventually, lambda: not is_idle(slow_server))
                    scope.cancel()
        return time.monotonic()

    left = trio.run(leave_soon)
    eventually(lambda: is_idle(slow_server))
    # The step that runs ends first, and a scrape takes some milliseconds.
    assert time.monotonic() - left < 2 * STEP_SECONDS


def test_leaving_after_five_chunks_disturbs_nobody(scripted_server: Server) -> None:
    undisturbed = texts(streams(scripted_server, 4, 150))
    staying = streams(scripted_server, 4, 150)
    leaving = streams(scripted_server, 4, 3000)
    eventually(lambda: all(stream.chunks >= 5 for stream in leaving))
    for stream in leaving:
        stream.leave()
    assert texts(staying) == undisturbed
    eventually(lambda: is_idle(scripted_server))


def test_two_hundred_abandoned_requests_do_not_delay_the_next(scripted_server: Server) -> None:
    """As vLLM's test has it: 200 requests of many tokens time out, and the next one answers at once."""

    async def ask_and_leave(endpoint: Endpoint) -> None:
        connection = Connection(endpoint)
        body = {"prompt": [300, 301], "max_tokens": 4000, "ignore_eos": True}
        with trio.move_on_after(0.5):
            await connection.json("POST", "/completions", body)
        await connection.aclose()

    async def main() -> None:
        endpoint = Endpoint.parse(scripted_server.url)
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(ask_and_leave, endpoint)

    trio.run(main)
    began = time.monotonic()
    assert scripted_server.complete(max_tokens=10).status_code == 200
    assert time.monotonic() - began < 2
    eventually(lambda: is_idle(scripted_server))


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_ends_with_the_tokens_so_far(scripted_server: Server, stream: bool) -> None:
    found = Stream(scripted_server, 3000, stream=stream, timeout=0.5).join()
    assert (found.status, found.finish_reason, found.failure) == (200, "timeout", None)
    assert found.text
    assert found.usage is not None
    assert 10 < found.usage["completion_tokens"] < 110


def test_a_deadline_by_header(scripted_server: Server) -> None:
    answer = httpx.post(
        f"{scripted_server.url}/v1/completions",
        json={"prompt": "x", "max_tokens": 3000, "ignore_eos": True},
        headers={"X-Request-Timeout": "0.3"},
    )
    assert answer.json()["choices"][0]["finish_reason"] == "timeout"


def test_a_burst_beyond_the_queue_is_refused_and_forgotten(serve: Serve, scripted_model: Path) -> None:
    """Whom the queue has no room for hears so at once; all others are served; then nothing is left."""
    server = serve("--model", str(scripted_model), *SCRIPTED, "--max-bs", "4", "--max-queue", "8")
    counted = server.metric("ullm_prompt_tokens_total")
    burst = [Stream(server, 100, [300 + n], stream=n % 2 == 0) for n in range(60)]
    for stream in burst:
        stream.join()
    refused = [stream for stream in burst if stream.status == 429]
    served = [stream for stream in burst if stream.status == 200]
    assert len(refused) + len(served) == 60
    assert len(served) >= 12
    assert all(s.failure is not None and s.failure["code"] == "queue_full" for s in refused)
    texts(served)
    eventually(lambda: is_idle(server))
    assert server.metric("ullm_prompt_tokens_total") - counted == len(served), (
        "the engine never heard of them"
    )
    texts(streams(server, 4, 20))


@pytest.mark.timing
def test_a_refusal_takes_milliseconds_and_says_when_to_come_back(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--max-bs", "1", "--max-queue", "1")
    running = streams(server, 1, 300)
    waiting = Stream(server, 1, [301])
    eventually(lambda: server.metric("ullm_num_requests_waiting") == 1)
    with server.client() as client:
        client.get("/live")
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            answer = client.post("/v1/completions", json={"prompt": "x"})
            seconds.append(time.perf_counter() - began)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
    assert sorted(seconds)[10] < 0.05
    texts([*running, waiting])


def test_admission_by_tokens(serve: Serve, scripted_model: Path) -> None:
    server = serve("--model", str(scripted_model), *SCRIPTED, "--max-admitted-tokens", "500")
    running = streams(server, 1, 300)
    refused = server.complete(max_tokens=300)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_tokens")
    never = server.complete(max_tokens=600)
    assert (never.status_code, never.json()["error"]["param"]) == (400, "max_tokens")
    texts(running)
    assert server.complete(max_tokens=300).status_code == 200


BAD = [
    (400, "temperature", {"prompt": "x", "temperature": -1}),
    (400, "max_tokens", {"prompt": "x", "max_tokens": 0}),
    (400, "prompt", {}),
    (400, "prompt", {"prompt": [1, 99999]}),
    (400, "n", {"prompt": "x", "n": 100000}),
    (404, "model", {"prompt": "x", "model": "another"}),
]


@pytest.mark.parametrize(("status", "param", "body"), BAD)
def test_a_bad_request_names_the_parameter(
    scripted_server: Server, status: int, param: str, body: dict[str, Any]
) -> None:
    answer = httpx.post(f"{scripted_server.url}/v1/completions", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"]


def test_other_bad_requests(scripted_server: Server) -> None:
    with scripted_server.client() as client:
        found = {
            400: client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}),
            404: client.get("/v1/nothing"),
            405: client.get("/v1/completions"),
            415: client.post("/v1/completions", content=b"x", headers={"content-type": "text/plain"}),
        }
        for status, answer in found.items():
            assert answer.status_code == status
            assert answer.json()["error"]["message"]
        large = b'{"prompt": "' + b"x" * (33 << 20) + b'"}'
        assert client.post("/v1/completions", content=large).status_code == 413


def test_too_long_a_prompt_says_both_lengths(scripted_server: Server) -> None:
    answer = scripted_server.complete(prompt=[300] * 5000)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "5000" in answer.json()["error"]["message"]
    assert "4096" in answer.json()["error"]["message"]


def test_abort_at_the_final_step(scripted_server: Server) -> None:
    """Leaving just as the last token comes: whichever is first, nothing stays behind."""

    def ask(number: int) -> None:
        stream = Stream(scripted_server, 20)
        eventually(lambda: stream.chunks >= 11 + number % 10 or stream.ended.is_set())
        stream.leave()
        stream.join()

    threads = [threading.Thread(target=ask, args=[number]) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: is_idle(scripted_server))
    assert scripted_server.complete(max_tokens=10).status_code == 200
