"""What one request may cost is bounded: each limit by its option, refused in milliseconds, by name."""

from __future__ import annotations

import time
from typing import Any

import httpx
import msgspec
import pytest
from fake_engine import CONTEXT_LEN, FakeEngine, serving

from ullm.config import ServerConfig
from ullm.errors import ConfigError, InvalidParameter
from ullm.protocol.messages import ModelInfo
from ullm.server.api import limits

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "hi"}


def info(context_len: int) -> ModelInfo:
    """Describe a model with this context."""
    return ModelInfo("Fake", 1, 256, (1,), context_len, 64, 16, "float32", "cpu")


@pytest.mark.parametrize(
    ("context_len", "limit"), [(2048, 1 << 20), (8192, 2 << 20), (131_072, 4 << 20), (None, 4 << 20)]
)
def test_a_body_may_have_what_the_context_can_need(context_len: int | None, limit: int) -> None:
    model = None if context_len is None else info(context_len)
    assert limits.body_limit(ServerConfig(), model) == limit
    assert limits.body_limit(ServerConfig(max_body=77), model) == 77


@pytest.mark.parametrize("name", ["max_body", "max_entries", "max_choices", "max_stop_chars"])
def test_limits_are_at_least_1(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be at least 1"):
        ServerConfig(**{name: 0})


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        (TEXT, {"prompt": [1] * 400_000}, "prompt", f"context length is {CONTEXT_LEN}"),
        (TEXT, {"prompt": [[1], [1] * 400_000]}, "prompt", f"context length is {CONTEXT_LEN}"),
        (TEXT, {"prompt": ["a"] * 257}, "prompt", "at most 256 (--max-choices)"),
        (TEXT, {"prompt": ["a"] * 8, "n": 128}, "n", "at most 256 (--max-choices)"),
        (TEXT, {"stop_token_ids": [1] * 400_000}, "stop_token_ids", "at most 4096 (--max-entries)"),
        (TEXT, {"logit_bias": {str(i): 1 for i in range(90_000)}}, "logit_bias", "4096 (--max-entries)"),
        (TEXT, {"stop": ["x" * 500] * 9}, "stop", "4500 characters in all; at most 4096 (--max-stop-chars)"),
        (TEXT, {"stop": "x" * 900_000}, "stop", "--max-stop-chars"),
        ("/detokenize", {"tokens": [1] * 400_000}, "tokens", f"at most {CONTEXT_LEN} (the model's context"),
        (CHAT, {"messages": [HELLO] * 30_000}, "messages", "at most 4096 (--max-entries)"),
        (CHAT, {"messages": [HELLO] * 5_000}, "messages", "at most 4096 (--max-entries)"),
        ("/tokenize", {"messages": [HELLO] * 5_000}, "messages", "at most 4096 (--max-entries)"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 5_000}]},
            "messages[0].content",
            "at most 4096 (--max-entries)",
        ),
        (CHAT, {"messages": [HELLO], "chat_template_kwargs": {"a": [[]] * 300_000}}, None, "--max-entries"),
        (TEXT, {"prompt": [[]] * 300_000}, None, "--max-entries"),
    ],
)
async def test_what_costs_too_much_is_refused(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str | None, says: str
) -> None:
    if path == TEXT:
        body.setdefault("prompt", "hi")
    response = await client.post(path, json=body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert says in error["message"]
    assert len(error["message"]) < 200
    assert error["param"] == param or error["message"].startswith("the body has more than 65536")


async def test_the_arguments_of_tool_calls_are_counted_too(client: httpx.AsyncClient) -> None:
    call = {"function": {"name": "f", "arguments": "[" + "[]," * 40_000 + "[]]"}}
    turn = {"role": "assistant", "tool_calls": [call, call]}
    response = await client.post(CHAT, json={"messages": [turn, HELLO]})
    assert response.status_code == 400
    assert "arguments of tool calls" in response.json()["error"]["message"]


async def test_limits_are_options(engine: FakeEngine) -> None:
    options = {"max_entries": 2, "max_choices": 3, "max_stop_chars": 4}
    async with serving(engine, **options) as url, httpx.AsyncClient(base_url=url) as client:
        for fields, status in (
            ({"n": 3, "stop": ["ab", "cd"], "stop_token_ids": [1, 2]}, 200),
            ({"n": 4}, 400),
            ({"prompt": ["a", "b"], "n": 2}, 400),
            ({"stop": ["abc", "cd"]}, 400),
            ({"stop_token_ids": [1, 2, 3]}, 400),
        ):
            response = await client.post(TEXT, json={"prompt": "hi", **fields})
            assert response.status_code == status, (fields, response.text)


async def test_without_priority_nobody_may_ask_for_one(engine: FakeEngine) -> None:
    async with serving(engine, priority=False) as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post(TEXT, json={"prompt": "hi", "priority": -5})
        assert response.status_code == 400
        assert "--no-priority" in response.json()["error"]["message"]
        assert (await client.post(TEXT, json={"prompt": "hi", "priority": 0})).status_code == 200


def test_brackets_within_texts_are_no_lists() -> None:
    text = '[{\\"' * 50_000
    limits.check_containers(msgspec.json.encode({"prompt": text, "other": '\\"[' * 50_000}), ServerConfig())


def test_counting_takes_milliseconds_whatever_the_body_has() -> None:
    for filling in (b'"[",', b'"\\"[",', b"[],", b'"\\\\[",'):
        body = b'{"a":[' + filling * ((4 << 20) // len(filling)) + b"0]}"
        began = time.perf_counter()
        try:
            limits.check_containers(body, ServerConfig())
        except InvalidParameter:
            pass
        assert time.perf_counter() - began < 0.5  # 0.02 to 0.06 alone on a core
