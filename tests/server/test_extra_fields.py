"""Fields of vLLM's on both routes: what they change in the answer."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest
from fake_engine import ANSWER, CONTEXT_LEN, ByteTokenizer, FakeEngine, serving

from ullm.parsing.formats import ChatFormat
from ullm.protocol.messages import TokenLogprobs
from ullm.server.api.logprobs import Offsets, TokenIdNames, completion_logprobs

pytestmark = pytest.mark.process

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
BODIES = [(TEXT, {"prompt": "hi"}), (CHAT, {"messages": HELLO})]
GO_ON = [*HELLO, {"role": "assistant", "content": "I begin"}]


async def ask(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def events(client: httpx.AsyncClient, path: str, **body: Any) -> list[Any]:
    answer = await client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# --- tokens ----------------------------------------------------------------------------------------


async def test_token_ids_of_a_completion(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = engine._tokenizer.plain(ANSWER)
    (choice,) = (await ask(client, TEXT, prompt="hi", return_token_ids=True, max_tokens=99))["choices"]
    prompt = engine.admitted[-1].prompt_token_ids
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (prompt, answer)
    found = [event["choices"][0] for event in await events(client, TEXT, prompt="hi", return_token_ids=True)]
    assert [choice.get("prompt_token_ids") for choice in found] == [prompt, *[None] * (len(found) - 1)]
    assert [token for choice in found for token in choice["token_ids"]] == answer[:16]
    (choice,) = (await ask(client, TEXT, prompt="hi"))["choices"]
    assert not {"token_ids", "prompt_token_ids"} & choice.keys()


async def test_token_ids_of_a_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = engine._tokenizer.plain(ANSWER)
    body = await ask(client, CHAT, messages=HELLO, return_token_ids=True)
    prompt = engine.admitted[-1].prompt_token_ids
    assert (body["prompt_token_ids"], body["choices"][0]["token_ids"]) == (prompt, answer)
    found = await events(client, CHAT, messages=HELLO, return_token_ids=True)
    assert [event.get("prompt_token_ids") for event in found] == [prompt, *[None] * (len(found) - 1)]
    assert [token for event in found for token in event["choices"][0].get("token_ids", [])] == answer
    assert "prompt_token_ids" not in await ask(client, CHAT, messages=HELLO)


async def test_tokens_as_ids_in_log_probabilities(client: httpx.AsyncClient) -> None:
    options = {"return_tokens_as_token_ids": True, "max_tokens": 2}
    body = await ask(client, TEXT, prompt="hi", logprobs=1, **options)
    tokens = body["choices"][0]["logprobs"]["tokens"]
    assert all(token.startswith("token_id:") for token in tokens)
    assert tokens[0] in body["choices"][0]["logprobs"]["top_logprobs"][0]
    body = await ask(client, CHAT, messages=HELLO, logprobs=True, top_logprobs=1, **options)
    (first, _) = body["choices"][0]["logprobs"]["content"]
    assert [first["token"], first["top_logprobs"][0]["token"]] == [tokens[0], tokens[0]]


def candidates(token_ids: list[int], scores: list[TokenLogprobs | None], names: Any) -> dict[str, float]:
    """Return the candidates of the first token, as the client reads them."""
    answer = completion_logprobs(token_ids, scores, names, Offsets(ByteTokenizer()))
    found: dict[str, float] = msgspec.json.decode(msgspec.json.encode(answer))["top_logprobs"][0]
    return found


def test_candidates_with_the_same_text_are_told_apart() -> None:
    """Bytes of an emoji: each is U+FFFD as a text."""
    tokenizer = ByteTokenizer()
    bytes_of_emoji = tokenizer.plain("🎉")
    own, *others = bytes_of_emoji
    top = [(own, -1.0), *((token, -2.0 - number) for number, token in enumerate(others)), (5, -9.0)]
    scores: list[TokenLogprobs | None] = [TokenLogprobs(own, -1.0, 1, top)]
    for names in (tokenizer, TokenIdNames(tokenizer)):
        found = candidates([own], scores, names)
        assert sorted(found.values()) == [-9.0, -4.0, -3.0, -2.0, -1.0]
    rare = TokenLogprobs(own, -30.0, 6, [(token, -1.0) for token in (*others, 5)])
    found = candidates([own], [rare], tokenizer)
    assert found["\ufffd"] == -30.0, "the text is the token's own, so nobody takes it for the likeliest"
    assert sorted(found.values()) == [-30.0, -1.0, -1.0, -1.0, -1.0]


async def test_scores_of_the_prompt_in_a_streamed_chat(client: httpx.AsyncClient) -> None:
    whole = await ask(client, CHAT, messages=HELLO, prompt_logprobs=1)
    found = await events(client, CHAT, messages=HELLO, prompt_logprobs=1)
    assert [event["prompt_logprobs"] for event in found if "prompt_logprobs" in event] == [
        whole["prompt_logprobs"]
    ]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_usage_in_each_event(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = await events(client, path, **body, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    assert found[-1]["choices"] == []
    assert found[-2]["usage"]["total_tokens"] == found[-1]["usage"]["total_tokens"]
    assert all(event["usage"]["prompt_tokens"] == found[-1]["usage"]["prompt_tokens"] for event in found)
    found = await events(client, path, **body, stream_options={"continuous_usage_stats": True})
    assert all(event["choices"] and event["usage"]["total_tokens"] for event in found)


# --- prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_prompts_are_cut(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    await ask(client, path, **body)
    full = engine.admitted[-1].prompt_token_ids
    for fields, kept in (
        ({"truncate_prompt_tokens": 2}, full[-2:]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, full[:2]),
        ({"truncate_prompt_tokens": 999}, full),
        ({"truncate_prompt_tokens": -1}, full),
    ):
        await ask(client, path, **body, **fields)
        assert engine.admitted[-1].prompt_token_ids == kept


async def test_a_cut_prompt_leaves_room_for_the_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    text = "x" * 2000
    body = await ask(client, TEXT, prompt=text, max_tokens=10, truncate_prompt_tokens=-1, echo=True)
    assert len(engine.admitted[-1].prompt_token_ids) == CONTEXT_LEN - 10
    assert body["choices"][0]["text"].startswith("x" * (CONTEXT_LEN - 10) + "Gr")


async def test_the_last_message_goes_on(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(client, CHAT, messages=GO_ON, continue_final_message=True, documents=[{"text": "d"}])
    (seen,) = engine._tokenizer.seen
    assert seen["kwargs"] == {"continue_final_message": True, "documents": [{"text": "d"}]}
    assert engine._tokenizer.decode(engine.admitted[-1].prompt_token_ids).endswith("I begin")


async def test_documents_that_the_template_has_no_place_for_are_told(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine._tokenizer.chat_format = ChatFormat(shows_documents=False)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    await ask(client, CHAT, messages=messages, documents=[{"title": "T", "text": "Grüße"}, {"text": "d"}])
    system = engine._tokenizer.seen[-1]["messages"][0]
    assert system["role"] == "system"
    assert system["content"].startswith("Be brief.\n\n")
    assert '\n{"title": "T", "text": "Grüße"}\n{"text": "d"}\n' in system["content"]


async def test_echo_begins_with_the_message_that_goes_on(client: httpx.AsyncClient) -> None:
    options = {"continue_final_message": True, "echo": True}
    body = await ask(client, CHAT, messages=GO_ON, **options)
    assert body["choices"][0]["message"]["content"] == "I begin" + ANSWER
    found = await events(client, CHAT, messages=GO_ON, n=2, **options)
    for index in range(2):
        deltas = [each["choices"][0] for each in found if each["choices"][0]["index"] == index]
        assert "".join(each["delta"].get("content", "") for each in deltas) == "I begin" + ANSWER
    body = await ask(client, CHAT, messages=HELLO, echo=True)
    assert body["choices"][0]["message"]["content"] == ANSWER, "the last message is the user's"


async def test_a_template_of_the_request(engine: FakeEngine) -> None:
    async with (
        serving(engine, trust_request_chat_template=True) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        await ask(client, CHAT, messages=HELLO, chat_template="{{ messages }}")
        assert engine._tokenizer.seen[-1]["kwargs"] == {"chat_template": "{{ messages }}"}


async def test_filters_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for path, body in BODIES:
        await ask(client, path, **body, allowed_token_ids=[5, 6], bad_words=["x y"])
        params = engine.admitted[-1].params
        assert (params.allowed_token_ids, params.bad_words) == ((5, 6), ("x y",))


# --- ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["timeout", "abort"])
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_reasons_that_openai_has(
    monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr("fake_engine._end", lambda number, script, limit: reason if number == 1 else None)
    for openai, shown, own in ((False, reason, None), (True, "length", reason)):
        engine = FakeEngine()
        engine.script = lambda index: [72, 73]
        async with (
            serving(engine, openai_finish_reasons=openai) as url,
            httpx.AsyncClient(base_url=url) as client,
        ):
            (choice,) = (await ask(client, path, **body))["choices"]
            assert (choice["finish_reason"], choice.get("finish_cause")) == (shown, own)
            (choice,) = (await events(client, path, **body))[-1]["choices"]
            assert (choice["finish_reason"], choice.get("finish_cause")) == (shown, own)
