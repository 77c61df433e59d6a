"""``/v1/chat/completions`` over a real connection, by hand and with OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
import trio
from fake_engine import ANSWER, FakeEngine, serving

HELLO = [{"role": "user", "content": "hello"}]


async def chat(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"messages": HELLO, **body})


async def events(client: httpx.AsyncClient, **body: Any) -> list[Any]:
    response = await chat(client, stream=True, **body)
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_unary(client: httpx.AsyncClient) -> None:
    body = (await chat(client)).json()
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"]["completion_tokens"] == len(ANSWER.encode())


async def test_stream_begins_with_the_role_and_ends_with_the_reason(client: httpx.AsyncClient) -> None:
    first, *middle, last = await events(client)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"]["content"] for event in middle) == ANSWER
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "stop"


async def test_choices_differ_and_each_has_its_role(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda index: engine._tokenizer.plain(f"choice {index}")
    body = (await chat(client, n=3)).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == [f"choice {i}" for i in range(3)]
    found = await events(client, n=3, stream_options={"include_usage": True})
    assert [event["choices"][0]["delta"].get("role") for event in found[:3]] == ["assistant"] * 3
    assert found[-1]["usage"]["completion_tokens"] == 3 * len("choice 0")


async def test_logprobs(client: httpx.AsyncClient) -> None:
    body = (await chat(client, logprobs=True, top_logprobs=2, max_tokens=2)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["G", "r"]
    assert [entry["logprob"] for entry in content[0]["top_logprobs"]] == [-0.5, -9999.0]
    streamed = [
        entry
        for event in await events(client, logprobs=True, top_logprobs=2, max_tokens=2)
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


async def test_prompt_logprobs(client: httpx.AsyncClient) -> None:
    body = (await chat(client, prompt_logprobs=0)).json()
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]


async def test_messages_reach_the_template_in_its_own_terms(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    response = await chat(
        client,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
        ],
        tool_choice="auto",
        chat_template_kwargs={"enable_thinking": False},
        add_generation_prompt=False,
    )
    assert response.status_code == 200
    (seen,) = engine._tokenizer.seen
    assert seen["kwargs"] == {"enable_thinking": False}
    assert seen["tools"] is None
    assert seen["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]


async def test_tool_choice_none_keeps_the_tools_away(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    assert (await chat(client, tools=[tool], tool_choice="none")).status_code == 200
    assert engine._tokenizer.seen[0]["tools"] is None


async def test_the_newer_name_of_max_tokens_wins(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await chat(client, max_tokens=5, max_completion_tokens=3)
    await chat(client)
    assert [generation.params.max_tokens for generation in engine.admitted] == [3, None]


def test_the_openai_client() -> None:
    """The official client is asyncio's or synchronous, so the server runs in a trio loop beside it."""

    async def main() -> None:
        async with serving(FakeEngine(), api_key="secret") as url:
            await trio.to_thread.run_sync(_with_sync_client, url)
            await trio.to_thread.run_sync(_with_async_client, url)

    trio.run(main)


def _with_sync_client(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["fake"]
        answer = client.chat.completions.create(model="fake", messages=HELLO)  # type: ignore[arg-type]
        assert answer.choices[0].message.content == ANSWER
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 2
        text = client.completions.create(model="fake", prompt="hi", max_tokens=2, logprobs=1)
        assert text.choices[0].text == "Gr"
        stream = client.completions.create(model="fake", prompt="hi", max_tokens=100, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == ANSWER
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="other", messages=HELLO)  # type: ignore[arg-type]
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def _with_async_client(url: str) -> None:
    import asyncio

    async def main() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="fake",
                messages=HELLO,  # type: ignore[arg-type]
                stream=True,
                stream_options={"include_usage": True},
            )
            text = ""
            async for chunk in stream:
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            assert chunk.usage is not None
            assert chunk.usage.completion_tokens == len(ANSWER.encode())
            return text

    assert asyncio.run(main()) == ANSWER
