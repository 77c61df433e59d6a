"""Fields within the objects of a request that nobody knows: named, warned of once, or refused."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import msgspec
import pytest
from fake_engine import FakeEngine, serving

from ullm.grammars.compiler import compile_grammar
from ullm.server.api.fields import FIELDS
from ullm.server.api.nested_fields import WITHOUT_EFFECT, shape_of, unknown_within

pytestmark = pytest.mark.process

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
HELLO = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"any": {"thing": 1}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"messages": [HELLO, {**HELLO, "contnt": 1}]}, "messages.contnt", "content"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "txt": 1}]}]},
        "messages.content.txt",
        "text",
    ),
    (
        CHAT,
        {
            "messages": [
                HELLO,
                {
                    "role": "assistant",
                    "tool_calls": [CALL, {**CALL, "function": {"name": "f", "argumnts": 1}}],
                },
                {"role": "tool", "content": "x", "tool_call_id": "c"},
            ]
        },
        "messages.tool_calls.function.argumnts",
        "arguments",
    ),
    (CHAT, {"tools": [{**TOOL, "functon": 1}]}, "tools.functon", "function"),
    (
        CHAT,
        {"tools": [TOOL, {"type": "function", "function": {"name": "g", "strct": True}}]},
        "tools.function.strct",
        "strict",
    ),
    (
        CHAT,
        {"response_format": {"type": "text", "jsn_schema": {}}},
        "response_format.jsn_schema",
        "json_schema",
    ),
    (
        CHAT,
        {"stream": True, "stream_options": {"include_usag": True}},
        "stream_options.include_usag",
        "include_usage",
    ),
    (MESSAGES, {"thinking": {"type": "disabled", "budget": 1}}, "thinking.budget", "budget_tokens"),
    (
        MESSAGES,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "txt": 1}]}]},
        "messages.content.txt",
        "text",
    ),
    (RESPONSES, {"input": [{**HELLO, "contnt": 1}]}, "input.contnt", "content"),
    (
        RESPONSES,
        {"tools": [{"type": "function", "name": "f", "paramters": {}}], "input": "x"},
        "tools.paramters",
        "parameters",
    ),
    (RESPONSES, {"input": "x", "text": {"formt": {}}}, "text.formt", "format"),
]


def body_of(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = {} if path == RESPONSES else {"messages": [HELLO]}
    if path == MESSAGES:
        body["max_tokens"] = 9
    return {**body, **fields}


@pytest.mark.parametrize(("path", "fields", "name", "meant"), CASES, ids=str)
async def test_they_are_named(
    engine: FakeEngine, path: str, fields: dict[str, Any], name: str, meant: str, caplog: Any
) -> None:
    body = body_of(path, fields)
    async with serving(engine) as url, httpx.AsyncClient(base_url=url) as client:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                answer = await client.post(path, json=body)
                assert answer.status_code == 200, answer.text
                assert answer.headers["X-Ullm-Ignored-Fields"] == name
    said = [record for record in caplog.records if "nobody knows it" in record.getMessage()]
    assert len(said) == 1, "once, not per request"
    async with serving(engine, strict_fields=True) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(path, json=body)
        assert answer.status_code == 400, answer.text
        message = answer.json()["error"]["message"]
        assert f"did you mean {meant}?" in message
        index = "[1]" if name in ("messages.contnt", "tools.function.strct") else ""
        assert f"{name.partition('.')[0]}{index}" in message


@pytest.mark.parametrize("spacing", [None, 3])
def test_a_body_as_clients_write_it_has_none(spacing: int | None) -> None:
    """With white space anywhere, and with what free objects have."""
    (chat,) = (schema for schema in FIELDS if schema.__name__ == "ChatCompletionRequest")
    body = {
        "messages": [{"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0}]}, HELLO],
        "tools": [TOOL],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "any": 1}},
        "metadata": {"any": 1},
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    }
    fields = msgspec.json.decode(json.dumps(body, indent=spacing), type=dict[str, msgspec.Raw])
    assert list(unknown_within(fields, shape_of(chat))) == []
    body["messages"][0]["tool_calls"][0]["functon"] = {}  # type: ignore[index]
    fields = msgspec.json.decode(json.dumps(body, indent=spacing), type=dict[str, msgspec.Raw])
    (found,) = unknown_within(fields, shape_of(chat))
    assert found.place == "messages[0].tool_calls[0].functon"


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (CHAT, {"type": "image_url", "image_url": {"url": "x"}}),
        (CHAT, {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}),
        (MESSAGES, {"type": "image", "source": {"type": "url", "url": "x"}}),
        (RESPONSES, {"type": "input_image", "image_url": "x", "detail": "auto"}),
    ],
    ids=str,
)
async def test_what_is_refused_is_not_called_unknown(
    engine: FakeEngine, path: str, part: dict[str, Any]
) -> None:
    turn = [{"role": "user", "content": [part]}]
    body = {"input": turn} if path == RESPONSES else body_of(path, {"messages": turn})
    async with serving(engine, strict_fields=True) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(path, json=body)
        assert answer.status_code == 400
        assert f"{part['type']}" in answer.json()["error"]["message"]


def test_what_has_no_effect_is_in_no_schema() -> None:
    for schema, names in WITHOUT_EFFECT.items():
        assert not set(names) & set(schema.__struct_fields__)


async def test_many_of_them_are_bounded(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    messages = [{**HELLO, f"x{index % 30}": 1} for index in range(60)]
    answer = await client.post(CHAT, json={"messages": messages})
    assert answer.headers["X-Ullm-Ignored-Fields"].split(", ") == [f"messages.x{n}" for n in range(20)]


async def test_the_schema_of_a_json_object(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    """llama.cpp's form: a schema beside the type is a constraint, not a field to ignore."""
    form = {"type": "json_object", "schema": {"type": "object", "required": ["city"]}}
    answer = await client.post(CHAT, json={"messages": [HELLO], "response_format": form})
    assert answer.status_code == 200
    asked = engine.admitted[-1].params.structured_outputs
    assert asked is not None
    assert "city" in compile_grammar(asked)
