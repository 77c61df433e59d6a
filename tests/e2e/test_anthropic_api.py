"""``/v1/messages`` of a tiny model on a real server: stop sequences, forced tools, a killed worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from tests.support.server import Server, starting_servers

pytestmark = pytest.mark.process

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"place": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 0}},
    "required": ["place", "days"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "input_schema": SCHEMA}


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    options = ("--dtype", "float32", "--standby-workers", "0", "--context-len", "1024")
    with starting_servers() as start:
        yield start("--model", str(tiny_model), *options)


def ask(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"max_tokens": 200, "messages": HELLO, "seed": 5, **fields}
    answer = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def streamed(server: Server, kill_at: int = 0, **fields: Any) -> list[dict[str, Any]]:
    """Return the events; the worker is killed after ``kill_at`` of them, if that is above 0."""
    body = {"max_tokens": 200, "messages": HELLO, "seed": 5, "stream": True, **fields}
    events: list[dict[str, Any]] = []
    with httpx.stream("POST", f"{server.url}/v1/messages", json=body, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_raw():
            for each in line.split(b"\n"):
                if each.startswith(b"data: ") and each.endswith(b"}"):
                    events.append(json.loads(each[6:]))
            if kill_at and len(events) >= kill_at:
                kill_at = 0
                server.worker().kill()
    return events


def joined(events: list[dict[str, Any]], kind: str, name: str) -> str:
    deltas = [each["delta"] for each in events if each["type"] == "content_block_delta"]
    return "".join(delta[name] for delta in deltas if delta["type"] == kind)


def test_a_stop_sequence(server: Server) -> None:
    text = ask(server)["content"][0]["text"]
    stop = text[20:23]
    found = ask(server, stop_sequences=[stop, "never to be seen"])
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)
    assert found["content"][0]["text"] == text[: text.index(stop)]


def test_a_forced_tool_is_called_as_its_schema_says(server: Server) -> None:
    choice = {"type": "tool", "name": "weather"}
    found = ask(server, tools=[WEATHER], tool_choice=choice)
    (call,) = found["content"]
    assert found["stop_reason"] == "tool_use"
    assert jsonschema_rs.is_valid(SCHEMA, call["input"])
    events = streamed(server, tools=[WEATHER], tool_choice=choice)
    assert json.loads(joined(events, "input_json_delta", "partial_json")) == call["input"]


def test_a_killed_worker_costs_a_pause(server: Server) -> None:
    undisturbed, worker = ask(server), server.worker().pid
    events = streamed(server, kill_at=20)
    assert joined(events, "text_delta", "text") == undisturbed["content"][0]["text"]
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    assert events[-2]["usage"]["output_tokens"] == undisturbed["usage"]["output_tokens"]
    assert server.worker().pid != worker
