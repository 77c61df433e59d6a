"""Bad input gets the right 4xx, which names the parameter, and does no harm to the server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import trio
from fake_engine import CONTEXT_LEN, FakeEngine, serving

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def check_error(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert error["param"] == param, error
    return error


@pytest.fixture(autouse=True)
async def unharmed(engine: FakeEngine, client: httpx.AsyncClient) -> AsyncIterator[None]:
    yield
    assert (await client.post(TEXT, json={"prompt": "hi"})).status_code == 200
    assert not engine.active


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "hi"} more',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\ud800 and more text behind it"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "hi", "temperature": NaN}',
        b'{"prompt": "hi", "temperature": Infinity}',
        b'{"prompt": "hi", "unknown": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "hi", "unknown": ' + b'{"a":' * 100_000,
    ],
)
async def test_what_is_not_json(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(TEXT, content=body, headers={"Content-Type": "application/json"})
    assert check_error(response, 400)["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [[1], "a", ["b"]]}, "prompt[2][0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [99_999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt[0]"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**40}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_json": {}, "guided_regex": "a+"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "x" * 300_000}, "guided_regex"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": [1]}}, "structured_outputs"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"grammar": "root ::= 'a'", "response_format": {"type": "json_object"}}, "grammar"),
        ({"return_token_ids": 1}, "return_token_ids"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": 99}, "prompt_logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"seed": 2**70}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"timeout": -1}, "timeout"),
        ({"priority": 2**40}, "priority"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": 5}, "stream_options"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"echo": "yes"}, "echo"),
        ({"add_special_tokens": False, "prompt": ""}, "prompt"),
    ],
)
async def test_completion_fields(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str | None
) -> None:
    response = await client.post(TEXT, json={"prompt": "hi", **fields})
    if param is None:  # a tokenizer that adds a token makes something of an empty text
        assert response.status_code == 200
    else:
        check_error(response, 400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [*HELLO, {"role": "tool"}]}, "messages[1].content"),
        (
            {"messages": [{"role": "assistant", "content": "", "audio": {"id": "a"}}]},
            "messages[0].audio",
        ),
        ({"messages": [{"role": "assistant", "content": "I begin"}]}, "messages"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"modalities": "text"}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"functions": [{"name": 1}]}, "functions[0].name"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"documents": [{}], "chat_template_kwargs": {"documents": [{}]}}, "documents"),
        ({"chat_template_kwargs": {"continue_final_message": True}}, "chat_template_kwargs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [5], "guided_regex": "a+"}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"response_format": {}}, "response_format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
    ],
)
async def test_chat_fields(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    check_error(await client.post(CHAT, json={"messages": HELLO, **fields}), 400, param)


async def test_missing_fields(client: httpx.AsyncClient) -> None:
    check_error(await client.post(TEXT, json={}), 400, "prompt")
    check_error(await client.post(CHAT, json={}), 400, "messages")
    check_error(await client.post("/tokenize", json={}), 400, "prompt")
    check_error(await client.post("/detokenize", json={}), 400, "tokens")
    check_error(await client.post(TEXT, json=[]), 400)


async def test_a_refused_field_that_is_not_json(client: httpx.AsyncClient) -> None:
    for value in (b'"\\ud800"', b"1e999", b"NaN"):
        body = b'{"prompt": "hi", "bad_words": ' + value + b"}"
        response = await client.post(TEXT, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, value


async def test_tokens_are_counted_as_a_chat_would_count_them(client: httpx.AsyncClient) -> None:
    for name, value in (
        ("continue_final_message", True),
        ("documents", [{"text": "x"}]),
        ("add_generation_prompt", False),
    ):
        fields = {"messages": HELLO, name: value}
        response = await client.post("/tokenize", json=fields)
        answer = await client.post(CHAT, json={**fields, "return_token_ids": True})
        assert response.json()["tokens"] == answer.json()["prompt_token_ids"]
    response = await client.post("/tokenize", json={"messages": HELLO, "chat_template": "x"})
    check_error(response, 400, "chat_template")


async def test_unknown_model(client: httpx.AsyncClient) -> None:
    for path, body in ((TEXT, {"prompt": "hi"}), (CHAT, {"messages": HELLO}), ("/tokenize", {"prompt": "x"})):
        error = check_error(await client.post(path, json={"model": "gpt-9", **body}), 404, "model")
        assert error["message"] == "the model 'gpt-9' is not served here; this server serves 'fake'"
    check_error(await client.get("/v1/models/some/other"), 404, "model")


async def test_too_long_a_prompt_says_both_lengths(client: httpx.AsyncClient) -> None:
    error = check_error(await client.post(TEXT, json={"prompt": "x" * 1000}), 400, "prompt")
    assert error["code"] == "context_length_exceeded"
    assert "1001" in error["message"]
    assert str(CONTEXT_LEN) in error["message"]


async def test_content_type(client: httpx.AsyncClient) -> None:
    body = json.dumps({"prompt": "hi"})
    for content_type in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
    ):
        response = await client.post(TEXT, content=body, headers={"Content-Type": content_type})
        assert check_error(response, 415)["code"] == "unsupported_media_type"
    for content_type in ("application/json; charset=utf-8", "application/vnd.x+json"):
        response = await client.post(TEXT, content=body, headers={"Content-Type": content_type})
        assert response.status_code == 200


@pytest.mark.parametrize("path", ["/nope", "/v1/", "//v1/models", "/v1/models/", "/v1/images", "/docs/"])
async def test_unknown_routes(client: httpx.AsyncClient, path: str) -> None:
    assert check_error(await client.get(path), 404)["code"] == "not_found"


async def test_wrong_methods(client: httpx.AsyncClient) -> None:
    for method, path in (("GET", TEXT), ("PUT", CHAT), ("DELETE", "/v1/models"), ("OPTIONS", TEXT)):
        response = await client.request(method, path)
        assert check_error(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"]


async def test_odd_request_targets(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    for target in (b"?x=1", b"*", b"http://elsewhere", b"/%ff%00", b"/v1/models?%zz"):
        stream = await trio.open_tcp_stream(host, int(port))
        async with stream:
            await stream.send_all(
                b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            answer = b"".join([data async for data in stream])
        assert answer.split(b" ")[1] in (b"404", b"403", b"400", b"200"), (target, answer)


@pytest.mark.parametrize("chunked", [False, True])
async def test_fifty_megabytes_get_413_in_full(
    client: httpx.AsyncClient, engine: FakeEngine, chunked: bool
) -> None:
    """The whole body is read, so that no reset destroys the answer, but not kept."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b" " * (1 << 20)

    content: Any = pieces() if chunked else b" " * (50 << 20)
    response = await client.post(TEXT, content=content, headers={"Content-Type": "application/json"})
    error = check_error(response, 413)
    assert error["code"] == "body_too_large"
    assert response.headers["connection"] == "close"


async def test_the_limit_is_the_configured_one(engine: FakeEngine) -> None:
    async with serving(engine, max_body=100) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post(TEXT, json={"prompt": "x" * 20})).status_code == 200
        check_error(await client.post(TEXT, json={"prompt": "x" * 200}), 413)


async def test_a_refusal_before_the_body_is_read_arrives(client: httpx.AsyncClient) -> None:
    """Such as a wrong method or route: the answer arrives although a large body is being sent."""
    body = b" " * (8 << 20)
    check_error(await client.post("/nope", content=body), 404)
    check_error(await client.put(TEXT, content=body), 405)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/detokenize", {"tokens": [99_999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": 5}, "tokens"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
    ],
)
async def test_tokenize_and_detokenize(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    check_error(await client.post(path, json=body), 400, param)
