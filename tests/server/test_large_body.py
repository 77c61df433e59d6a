"""Bodies above 4 MiB: parsed in a process of their own, which holds the event loop of nobody."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import psutil
import pytest
import trio
from fake_engine import FakeEngine, serving

from ullm.config import ServerConfig
from ullm.errors import EngineNotReady, InvalidParameter
from ullm.server import large_body
from ullm.server.api import large_body_child, limits, schemas
from ullm.server.api.body_parser import BodyParser
from ullm.server.api.large_body_child import MOST_PARSED, parsed
from ullm.server.large_body import LargeBodies

pytestmark = pytest.mark.process

TEXT = "/v1/completions"
MIB = 1 << 20
PAD = b" " * limits.MOST_BODY
Body = Callable[[], bytes]


def outcome(body: bytes, schema: type[msgspec.Struct] = schemas.CompletionRequest) -> large_body_child.Parsed:
    return parsed(body, schema, ServerConfig())


# --- what becomes of a body, wherever ---------------------------------------------------------------


def test_a_request_comes_through_as_it_is() -> None:
    body = {"prompt": "h\u00e9😀" * 5, "temperature": 1, "logit_bias": {"5": 1.5}, "stop": ["a"], "promt": 1}
    answer = outcome(json.dumps(body).encode() + PAD)
    request = msgspec.msgpack.decode(answer.fields, type=schemas.CompletionRequest)
    del body["promt"]
    assert request == msgspec.json.decode(json.dumps(body), type=schemas.CompletionRequest)
    assert [field.name for field in answer.unknown] == ["promt"]


@pytest.mark.parametrize(
    ("body", "is_json", "says"),
    [
        (b'{"prompt":"a"', False, "not valid JSON"),
        (b'{"prompt":' + b"[" * 100_000, False, "nested too deeply"),
        (b'{"prompt":[' + b"[]," * 100_000 + b"[]]}", True, "--max-entries"),
        (b'{"prompt":[' + b"1," * 1_300_000 + b"1]}", True, "1200000 values"),
        (b'{"prompt":"a","x":{' + b'"a":1,' * 400_000 + b'"a":1}}', True, "1200000 values"),
        (b'{"prompt":"a","temperature":"hot"}', True, "temperature: Expected"),
        (b'{"prompt":"a","logit_bias":{"x":1}}', True, "logit_bias['x']"),
        (b'{"prompt":"a","guided_json":5}', True, ""),
        (b'{"prompt":"' + b"x" * MOST_PARSED + b'"}', True, f"at most {MOST_PARSED}"),
    ],
    ids=["cut", "nested", "lists", "values", "names", "type", "bias", "refused", "text"],
)
def test_what_is_wrong_is_said(body: bytes, is_json: bool, says: str) -> None:
    answer = outcome(body + PAD)
    assert answer.error is not None
    assert says in answer.error
    assert answer.is_json is is_json


def test_values_within_texts_are_none() -> None:
    assert outcome(json.dumps({"prompt": ',:"' * 1_500_000}).encode()).error is None


# --- the process ------------------------------------------------------------------------------------


async def test_a_large_body_is_served_and_parsed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_here(*_: Any) -> Any:
        raise AssertionError("the event loop parses it")

    monkeypatch.setattr(BodyParser, "parse", not_here)
    ids = [7] * 5
    content = json.dumps({"prompt": ids, "promt": "x" * 20 * MIB}).encode()
    others = psutil.Process().children()
    async with (
        serving(engine := FakeEngine(), max_body=64 * MIB) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        answer = await client.post(TEXT, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Ullm-Ignored-Fields"] == "promt"
        assert answer.json()["usage"]["prompt_tokens"] == len(ids)
    assert psutil.Process().children() == others
    assert engine.admitted


async def test_a_large_body_is_refused() -> None:
    content = b'{"prompt":[' + b"1," * (8 * MIB) + b"1]}"
    async with serving(FakeEngine(), max_body=64 * MIB) as url, httpx.AsyncClient(timeout=60) as client:
        answer = await client.post(url + TEXT, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "values" in answer.json()["error"]["message"]


def large(monkeypatch: pytest.MonkeyPatch, program: str) -> LargeBodies:
    """Return one whose process runs another program."""
    monkeypatch.setattr(large_body, "python_command", lambda *_: [sys.executable, "-c", program])
    return LargeBodies(ServerConfig())


async def parse(bodies: LargeBodies) -> Any:
    return await bodies.parse(b"{}", schemas.CompletionRequest)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("program", "error", "says"),
    [
        ("import os; os.kill(os.getpid(), 27)", InvalidParameter, "more processor time or memory"),
        (f"exit({large_body_child.OUT_OF_MEMORY})", InvalidParameter, "more processor time or memory"),
        ("import os; os.kill(os.getpid(), 9)", EngineNotReady, "was lost"),
        ("exit(1)", EngineNotReady, "was lost"),
    ],
    ids=["time", "memory", "killed", "failed"],
)
async def test_its_end_is_told(
    monkeypatch: pytest.MonkeyPatch, program: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        await parse(large(monkeypatch, program))


async def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_body, "python_command", lambda *_: ["/nowhere/python"])
    with pytest.raises(EngineNotReady, match="none can be started"):
        await parse(LargeBodies(ServerConfig()))


async def test_it_ends_with_its_request_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies, others = large(monkeypatch, "import time; time.sleep(1000)"), psutil.Process().children()
    with trio.move_on_after(0.2) as scope:
        await parse(bodies)
    assert scope.cancelled_caught
    monkeypatch.setattr(large_body, "WALL_SECONDS", 0.2)
    with pytest.raises(EngineNotReady, match="in time"):
        await parse(bodies)
    assert psutil.Process().children() == others


@pytest.mark.skipif(os.name != "posix", reason="other systems do not limit it")
async def test_the_kernel_bounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import ullm.server.api.large_body_child as c; c.SECONDS = 0.1; c._limit(0)\nwhile True: pass"
    with pytest.raises(InvalidParameter, match="more processor time"):
        await parse(large(monkeypatch, program))
    assert signal.SIGPROF == 27
