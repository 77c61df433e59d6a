"""Bodies as clients write them, and fields that nobody knows."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_engine import CONTEXT_LEN, FakeEngine, serving

pytestmark = pytest.mark.process

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
JSON = {"Content-Type": "application/json"}
BODIES = [(TEXT, {"prompt": "hi"}), (CHAT, {"messages": HELLO})]
LIMITS = ["max_tokens", "max_new_tokens", "max_completion_tokens"]


async def post(client: httpx.AsyncClient, body: Any, path: str = TEXT, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await client.post(path, content=content, headers={**JSON, **headers})


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


# --- the limit of tokens, by any name --------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("name", LIMITS)
async def test_the_limit_has_several_names(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any], name: str
) -> None:
    answer = await post(client, {**body, name: 2}, path)
    assert answer.json()["usage"]["completion_tokens"] == 2
    assert engine.admitted[-1].params.max_tokens == 2
    for value in (0, -5):
        error = error_of(await post(client, {**body, name: value}, path))
        assert error["param"] == name
        assert error["message"].startswith(name)
        assert not [other for other in LIMITS if other != name and other in error["message"]]
    error = error_of(await post(client, {**body, name: 2, "min_tokens": 3}, path))
    assert error["message"] == f"min_tokens is 3, more than {name} 2"


async def test_two_names_with_two_values(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    error = error_of(await post(client, {"prompt": "hi", "max_tokens": 2, "max_new_tokens": 3}))
    assert error["param"] == "max_new_tokens"
    assert (await post(client, {"prompt": "hi", "max_tokens": 2, "max_new_tokens": 2})).status_code == 200
    await post(client, {"prompt": "hi", "max_tokens": 5, "max_completion_tokens": 3})
    assert engine.admitted[-1].params.max_tokens == 3


@pytest.mark.parametrize("name", LIMITS)
async def test_the_simple_route_knows_them_too(client: httpx.AsyncClient, name: str) -> None:
    answer = await post(client, {"prompt": "hi", name: 2}, "/inference")
    assert answer.json()["num_generated_tokens"] == 2
    assert error_of(await post(client, {"prompt": "hi", name: 0}, "/inference"))["param"] == name


async def test_no_new_tokens_with_echo_under_any_name(client: httpx.AsyncClient) -> None:
    for name in LIMITS:
        answer = (await post(client, {"prompt": "hi", "echo": True, "logprobs": 0, name: 0})).json()
        assert answer["choices"][0]["text"] == "hi"
        assert answer["usage"]["completion_tokens"] == 0


async def test_a_prompt_that_is_too_long_is_refused_in_openais_words(client: httpx.AsyncClient) -> None:
    """LiteLLM, aider and others look for these words, LangChain and others for the code."""
    error = error_of(await post(client, {"prompt": "x" * 1000}))
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith(
        f"This model's maximum context length is {CONTEXT_LEN} tokens. However,"
    )


# --- numbers ---------------------------------------------------------------------------------------


async def test_whole_numbers_may_be_written_as_floats(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = b"""{"prompt": [5.0, 6], "max_tokens": 5.0, "n": 1e0, "top_k": 4.0, "seed": 7.0,
        "stop_token_ids": [1.0, 2], "logit_bias": {"5": 1.0, "6": 2}, "temperature": 1, "logprobs": 2.0}"""
    assert (await post(client, body)).status_code == 200
    params = engine.admitted[-1].params
    assert engine.admitted[-1].prompt_token_ids == [5, 6]
    assert (params.max_tokens, params.n, params.top_k, params.seed, params.logprobs) == (5, 1, 4, 7, 2)
    assert params.stop_token_ids == (1, 2)
    assert params.logit_bias == {5: 1.0, 6: 2.0}
    assert all(type(token) is int for token in engine.admitted[-1].prompt_token_ids)
    answer = await post(client, {"tokens": [72.0, 73.0]}, "/detokenize")
    assert answer.status_code == 200
    answer = await post(client, {"messages": HELLO, "max_completion_tokens": 3.0}, CHAT)
    assert answer.json()["usage"]["completion_tokens"] == 3


async def test_numbers_that_are_not_whole_are_refused(client: httpx.AsyncClient) -> None:
    deep = {"prompt": [1.0, json.loads("[" * 300 + "1.0" + "]" * 300)]}
    assert error_of(await post(client, deep))["param"] == "prompt[1][0]"
    for field, value in (("max_tokens", 5.5), ("seed", 1e30), ("stop_token_ids", [1.0, 2.5])):
        error = error_of(await post(client, {"prompt": "hi", field: value, "n": 1.0}))
        assert error["param"].partition("[")[0] == field


async def test_floats_elsewhere_stay_floats(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"messages": HELLO, "max_tokens": 1.0, "chat_template_kwargs": {"x": 2.0}}
    assert (await post(client, body, CHAT)).status_code == 200
    (seen,) = engine._tokenizer.seen
    assert repr(seen["kwargs"]["x"]) == "2.0"


async def test_a_seed_of_minus_one_is_a_new_one(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for path, body in BODIES:
        assert (await post(client, {**body, "seed": -1}, path)).status_code == 200
        assert engine.admitted[-1].params.seed is None
        await post(client, {**body, "seed": -2}, path)
        assert engine.admitted[-1].params.seed == -2


@pytest.mark.parametrize(
    ("bias", "key"),
    [
        ({"5": 1, "x": 1}, "'x'"),
        ({"5": 1, "6.5": 1}, "'6.5'"),
        ({"5": 1, "6": "1"}, "'6'"),
        ({"5": 1, "6": None}, "'6'"),
        ({"5": 1, "6": 101}, "6"),
        ({"5": 1, "-6": 1}, "-6"),
    ],
)
async def test_a_wrong_bias_is_named_by_its_key(
    client: httpx.AsyncClient, bias: dict[str, Any], key: str
) -> None:
    error = error_of(await post(client, {"prompt": "hi", "logit_bias": bias}))
    assert error["param"] == "logit_bias"
    assert error["message"].startswith(f"logit_bias[{key}]")


# --- encodings -------------------------------------------------------------------------------------


async def test_a_byte_order_mark_is_skipped(client: httpx.AsyncClient) -> None:
    for path, body in BODIES:
        assert (await post(client, b"\xef\xbb\xbf" + json.dumps(body).encode(), path)).status_code == 200


async def test_compressed_bodies_are_read(client: httpx.AsyncClient) -> None:
    body = json.dumps({"prompt": "hi", "max_tokens": 2}).encode()
    for packed in (gzip.compress(body), gzip.compress(body[:5]) + gzip.compress(body[5:])):
        answer = await post(client, packed, **{"Content-Encoding": "gzip"})
        assert answer.json()["usage"]["completion_tokens"] == 2
    assert (await post(client, body, **{"Content-Encoding": "identity"})).status_code == 200


@pytest.mark.parametrize(
    "body", [b"{}", gzip.compress(mtime=0, data=b'{"prompt": "hi"}')[:-9], b"\x1f\x8b\x00"]
)
async def test_what_is_not_gzip(client: httpx.AsyncClient, body: bytes) -> None:
    error = error_of(await post(client, body, **{"Content-Encoding": "gzip"}))
    assert error["code"] == "invalid_json"
    assert "gzip" in error["message"]


async def test_other_encodings_are_refused_by_name(client: httpx.AsyncClient) -> None:
    for encoding in ("br", "deflate", "gzip, gzip"):
        error = error_of(await post(client, b"{}", **{"Content-Encoding": encoding}), 415)
        assert encoding in error["message"]


async def test_a_small_body_that_unpacks_to_a_large_one(engine: FakeEngine) -> None:
    bomb = gzip.compress(b" " * (4 << 20)) * 8
    async with serving(engine, max_body=1 << 20) as url, httpx.AsyncClient(base_url=url) as client:
        error = error_of(await post(client, bomb, **{"Content-Encoding": "gzip"}), 413)
        assert error["code"] == "body_too_large"


# --- streams ---------------------------------------------------------------------------------------


async def test_proxies_are_told_not_to_hold_events_back(client: httpx.AsyncClient) -> None:
    for path, body in BODIES:
        answer = await post(client, {**body, "stream": True}, path)
        assert answer.headers["x-accel-buffering"] == "no"


# --- fields that nobody knows ----------------------------------------------------------------------

EVERY_BODY = [
    *BODIES,
    ("/inference", {"prompt": "hi"}),
    ("/tokenize", {"prompt": "hi"}),
    ("/detokenize", {"tokens": [5]}),
]


@pytest.fixture
async def strict(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(engine, strict_fields=True) as url, httpx.AsyncClient(base_url=url) as client:
        yield client


@pytest.mark.parametrize(("path", "body"), EVERY_BODY)
async def test_unknown_fields_are_named(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ullm"):
        for _ in range(2):
            answer = await post(client, {**body, "temprature": 1, "a\n,b": {"x": [1]}}, path)
            assert answer.status_code == 200
            assert answer.headers["x-ullm-ignored-fields"] == "temprature, a%0A%2Cb"
    warned = [record for record in caplog.records if "is ignored" in record.getMessage()]
    assert len(warned) == 2, "each name once"
    assert "x-ullm-ignored-fields" not in (await post(client, body, path)).headers
    if path in (CHAT, TEXT):
        streamed = await post(client, {**body, "stream": True, "nothing": 1, "user": "me"}, path)
        assert streamed.headers["x-ullm-ignored-fields"] == "nothing"


@pytest.mark.parametrize(("path", "body"), EVERY_BODY)
async def test_strict_servers_refuse_unknown_fields(
    strict: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    error = error_of(await post(strict, {**body, "modell": 1}, path))
    assert error["param"] == "modell"
    assert "is not a field of this request" in error["message"]
    assert (await post(strict, body, path)).status_code == 200
    if path in (CHAT, TEXT):
        assert "did you mean model?" in error["message"]
        assert (await post(strict, {**body, "user": "me"}, path)).status_code == 200


async def test_the_log_is_not_flooded(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ullm"):
        for first in range(0, 300, 30):
            fields = {f"field{number}": 1 for number in range(first, first + 30)}
            answer = await post(client, {"prompt": "hi", **fields})
            assert answer.headers["x-ullm-ignored-fields"].count(",") == 19
    assert len([record for record in caplog.records if "is ignored" in record.getMessage()]) == 100
