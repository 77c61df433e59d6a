"""The HTTP client and the server target, against servers that answer from a script."""

from __future__ import annotations

import json
from contextlib import aclosing
from functools import partial
from typing import Any

import pytest
import trio

from ullm.bench.server_target import ServerTarget
from ullm.bench.stats import BenchRecord
from ullm.bench.workload import BenchRequest
from ullm.cli.backend import ServerBackend, request_fields
from ullm.client.completions import first_model
from ullm.client.http import Connection, Endpoint
from ullm.errors import ServerRefused, ServerUnreachable, UsageError
from ullm.sampling import SamplingParams

pytestmark = pytest.mark.process


class Scripted:
    """A server that reads requests and answers each with the next prepared bytes."""

    def __init__(self) -> None:
        self.answers: list[bytes | list[bytes]] = []
        self.requests: list[tuple[str, Any]] = []
        self.connections = 0

    async def __call__(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        data = b""
        while self.answers:
            while b"\r\n\r\n" not in data:
                more = await stream.receive_some()
                if not more:
                    return
                data += more
            head, _, data = data.partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
            size = int(headers.get("content-length", 0))
            while len(data) < size:
                data += await stream.receive_some()
            body, data = data[:size], data[size:]
            self.requests.append((lines[0], {"headers": headers, "body": json.loads(body) if body else None}))
            answer = self.answers.pop(0)
            for part in [answer] if isinstance(answer, bytes) else answer:
                try:
                    await stream.send_all(part)
                except trio.BrokenResourceError:
                    return  # the client has left, as some of these tests mean it to


@pytest.fixture
def script() -> Scripted:
    return Scripted()


@pytest.fixture
async def endpoint(script: Scripted, nursery: trio.Nursery) -> Endpoint:
    listeners = await nursery.start(partial(trio.serve_tcp, script, 0, host="127.0.0.1"))
    return Endpoint.parse(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}", "secret")


def whole(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def chunked(*pieces: bytes) -> list[bytes]:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces), b"0\r\n\r\n"]


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(piece: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": piece, "finish_reason": finish}])


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h", "http://h:80/v1"),
        ("https://h/api/v2/", "https://h:443/api/v2"),
        ("h:9", "http://h:9/v1"),
        ("http://[::1]:5", "http://::1:5/v1"),
    ],
)
def test_urls(url: str, expected: str) -> None:
    assert Endpoint.parse(url).url == expected


@pytest.mark.parametrize("url", ["ftp://h", "http://", "http://h:x", "http://h:99999", ""])
def test_bad_urls(url: str) -> None:
    with pytest.raises(UsageError, match="--url"):
        Endpoint.parse(url)


async def test_json_and_keep_alive(script: Scripted, endpoint: Endpoint) -> None:
    script.answers = [whole(b'{"data": [{"id": "m"}]}'), whole(b'{"x": 1}')]
    connection = Connection(endpoint)
    assert await connection.json("GET", "/models") == {"data": [{"id": "m"}]}
    assert await connection.json("POST", "/x", {"a": "ü"}) == {"x": 1}
    await connection.aclose()
    assert script.connections == 1
    (first, seen), (second, posted) = script.requests
    assert (first, second) == ("GET /v1/models HTTP/1.1", "POST /v1/x HTTP/1.1")
    assert seen["headers"]["authorization"] == "Bearer secret"
    assert posted["body"] == {"a": "ü"}


async def test_a_closed_connection_is_opened_again(script: Scripted, endpoint: Endpoint) -> None:
    script.answers = [whole(b"1", headers="Connection: close\r\n"), whole(b"2")]
    connection = Connection(endpoint)
    assert await connection.json("GET", "/a") == 1
    assert await connection.json("GET", "/a") == 2
    await connection.aclose()
    assert script.connections == 2


async def test_refusals_carry_the_servers_message(script: Scripted, endpoint: Endpoint) -> None:
    script.answers = [
        whole(b'{"error": {"message": "no such model", "code": 1}}', "404 Not Found"),
        whole(b'{"error": "plain"}', "400 Bad BenchRequest"),
        whole(b"<html>bad gateway</html>", "502 Bad Gateway"),
        whole(b"", "500 Oops"),
    ]
    connection = Connection(endpoint)
    for status, says in ((404, "no such model"), (400, "plain"), (502, "<html>bad"), (500, "no message")):
        with pytest.raises(ServerRefused, match=says) as caught:
            await connection.json("GET", "/models")
        assert caught.value.status == status
    assert script.connections == 1
    await connection.aclose()


@pytest.mark.parametrize(
    "answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", whole(b"{")]
)
async def test_broken_answers(script: Scripted, endpoint: Endpoint, answer: bytes) -> None:
    script.answers = [answer]
    async with aclosing(Connection(endpoint)) as connection:
        with pytest.raises(ServerUnreachable, match=r"http://127\.0\.0\.1"):
            await connection.json("GET", "/models")


async def test_nobody_listens() -> None:
    with pytest.raises(ServerUnreachable, match="is a server running there"):
        await first_model(Endpoint.parse("http://127.0.0.1:1"))


async def test_events_across_arbitrary_pieces(script: Scripted, endpoint: Endpoint) -> None:
    raw = b": a comment\n\ndata: one\r\n\r\nevent: x\ndata:two\n\ndata: [DONE]\n\n"
    script.answers = [chunked(*(raw[i : i + 3] for i in range(0, len(raw), 3)))]
    connection = Connection(endpoint)
    async with connection.events("/completions", {}) as events:
        assert [payload async for payload in events] == [b"one", b"two"]
    await connection.aclose()


async def test_leaving_early_hangs_up(script: Scripted, endpoint: Endpoint) -> None:
    script.answers = [chunked(text("a"), text("b")), chunked(text("c"))]
    connection = Connection(endpoint)
    for _ in range(2):
        async with connection.events("/completions", {}) as events:
            async for _payload in events:
                break
    await connection.aclose()
    assert script.connections == 2


async def test_target_counts_by_usage(script: Scripted, endpoint: Endpoint) -> None:
    usage = event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 7})
    script.answers = [chunked(text("a"), text("bc"), text("", "length"), usage, b"data: [DONE]\n\n")]
    target, record = ServerTarget(endpoint, "m"), BenchRecord(trio.current_time())
    await target.run(BenchRequest("hi", 7), record)
    await target.aclose()
    assert (record.tokens, record.prompt_tokens, len(record.arrivals)) == (7, 5, 2)
    assert (record.finish_reason, record.error) == ("length", None)
    sent = script.requests[0][1]["body"]
    assert (sent["prompt"], sent["max_tokens"], sent["ignore_eos"], sent["temperature"]) == ("hi", 7, True, 0)


async def test_target_counts_pieces_without_usage_and_reads_chat(
    script: Scripted, endpoint: Endpoint
) -> None:
    def delta(**fields: Any) -> bytes:
        return event(choices=[{"index": 0, "delta": fields}])

    script.answers = [chunked(delta(role="assistant", content=""), delta(content="a"), delta(content="b"))]
    target, record = ServerTarget(endpoint, "m", chat=True), BenchRecord(trio.current_time())
    await target.run(BenchRequest("hi", 2), record)
    await target.aclose()
    assert (record.tokens, len(record.arrivals)) == (2, 2)
    assert script.requests[0][0].startswith("POST /v1/chat/completions")
    assert script.requests[0][1]["body"]["messages"] == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "answer",
    [
        chunked(text("a"), event(error={"message": "it broke"})),
        chunked(b"data: nonsense\n\n"),
        chunked(text("a"))[:-1],
        whole(b'{"error": {"message": "it broke"}}', "503 No"),
    ],
    ids=["error event", "not json", "cut off", "status"],
)
async def test_target_records_failures(
    script: Scripted, endpoint: Endpoint, answer: bytes | list[bytes]
) -> None:
    script.answers = [answer]
    target, record = ServerTarget(endpoint, "m"), BenchRecord(trio.current_time())
    await target.run(BenchRequest("hi", 2), record)
    await target.aclose()
    assert record.error is not None
    assert "127.0.0.1" in record.error


async def test_server_backend_streams_text_and_details(script: Scripted, endpoint: Endpoint) -> None:
    usage = event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 2})
    script.answers = [chunked(text("Hel"), text("lo", "stop"), usage, b"data: [DONE]\n\n")]
    async with ServerBackend(endpoint, "m").ask("hi", SamplingParams(temperature=0, seed=3)) as answer:
        assert [piece async for piece in answer.text] == ["Hel", "lo"]
    assert answer.details == {"prompt_tokens": 5, "completion_tokens": 2, "finish_reason": "stop"}
    sent = script.requests[0][1]["body"]
    assert (sent["model"], sent["prompt"], sent["temperature"], sent["seed"]) == ("m", "hi", 0, 3)
    assert "top_p" not in sent


async def test_server_backend_reports_errors_in_the_stream(script: Scripted, endpoint: Endpoint) -> None:
    script.answers = [chunked(text("a"), event(error={"message": "it broke"}))]
    said = []

    async def listen() -> None:
        async with ServerBackend(endpoint, "m").ask("hi", SamplingParams()) as answer:
            async for piece in answer.text:
                said.append(piece)

    with pytest.raises(ServerRefused, match="it broke"):
        await listen()
    assert said == ["a"]


def test_request_fields_are_those_that_were_chosen() -> None:
    fields = request_fields(SamplingParams(max_tokens=3, stop="x"))
    assert fields == {
        "temperature": 1.0, "max_tokens": 3, "stop": ("x",),
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
