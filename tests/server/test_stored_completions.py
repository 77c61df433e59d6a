"""Chats and completions under ``--journal``, on a fake engine: their streams can be taken up anywhere."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import ANSWER, FakeEngine, serving

from ullm.engine import EngineState
from ullm.errors import EngineDead, QueueFull
from ullm.journal.journal import Journal, JournalFull
from ullm.server.api.requests import SESSION_HEADER

CHAT, COMPLETION, MESSAGE = "/v1/chat/completions", "/v1/completions", "/v1/messages"
EOS_ID = 1
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = 'See.\n<tool_call>{"name": "weather", "arguments": {"place": "Köln"}}</tool_call>'


@pytest.fixture
async def durable(engine: FakeEngine, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    journal = str(tmp_path / "answers.sqlite")
    async with serving(engine, journal=journal) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        yield client


def events_of(text: str) -> list[str]:
    return text.split("\n\n")[:-1]


def number_of(event: str) -> tuple[str, int]:
    """Return the stream's name and the event's number."""
    name, _, number = event.partition("\n")[0].removeprefix("id: ").rpartition(":")
    return name, int(number)


def data_of(events: list[str]) -> list[dict[str, Any]]:
    lines = [line[6:] for event in events for line in event.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def texts_of(events: list[str]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for choice in (choice for chunk in data_of(events) for choice in chunk.get("choices", ())):
        piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
        texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return texts


def scores_of(events: list[str]) -> dict[int, list[Any]]:
    """Return what is said of log probabilities, one entry per token, and of prompts."""
    found: dict[int, list[Any]] = {}
    for chunk in data_of(events):
        for choice in chunk.get("choices", ()):
            scores = choice.get("logprobs") or {}
            mine = found.setdefault(choice["index"], [])
            mine += scores.get("content") or ()
            if "tokens" in scores:
                mine += [list(each) for each in zip(*scores.values(), strict=True)]
            mine += choice.get("prompt_logprobs") or chunk.get("prompt_logprobs") or ()
    return found


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, HELLO),
    "chat-usage": (
        CHAT,
        HELLO | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "chat-n": (CHAT, HELLO | {"n": 3, "return_token_ids": True}),
    "chat-tool": (CHAT, HELLO | {"tools": [TOOL]}),
    "completion": (COMPLETION, {"prompt": "Hello", "max_tokens": 30}),
    "completion-echo": (
        COMPLETION,
        {"prompt": ["One", "Two"], "n": 2, "echo": True, "max_tokens": 30, "return_token_ids": True},
    ),
    "completion-only-echo": (COMPLETION, {"prompt": "One", "echo": True, "max_tokens": 0}),
    "completion-cut": (COMPLETION, {"prompt": "One", "max_tokens": 3}),
    "chat-logprobs": (
        CHAT,
        HELLO
        | {"logprobs": True, "top_logprobs": 2, "n": 2, "prompt_logprobs": 1}
        | {"return_tokens_as_token_ids": True},
    ),
    "completion-logprobs": (
        COMPLETION,
        {"prompt": ["One", "Two"], "n": 2, "echo": True, "max_tokens": 9, "logprobs": 2},
    ),
    "completion-score": (COMPLETION, {"prompt": "One", "echo": True, "max_tokens": 0, "logprobs": 1}),
}
TALK = HELLO | {"max_tokens": 30}
SCHEMA = {"name": "weather", "input_schema": {"type": "object"}}
MESSAGE_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "message": (MESSAGE, TALK),
    "message-tool": (MESSAGE, TALK | {"tools": [SCHEMA], "max_tokens": 100}),
}


def lengths(engine: FakeEngine, asked: dict[str, Any]) -> None:
    """Have each choice say something of another length."""
    said = CALL if "tools" in asked else ANSWER
    engine.script = lambda index: [*engine._tokenizer.plain(said * (1 + index)), EOS_ID]


@pytest.mark.parametrize("which", REQUESTS | MESSAGE_REQUESTS)
async def test_each_event_comes_once_wherever_a_stream_is_taken_up(
    engine: FakeEngine, durable: httpx.AsyncClient, which: str
) -> None:
    path, asked = (REQUESTS | MESSAGE_REQUESTS)[which]
    lengths(engine, asked)
    response = await durable.post(path, json=asked | {"stream": True})
    assert response.status_code == 200, response.text
    events = events_of(response.text)
    names, numbers = zip(*map(number_of, events), strict=True)
    assert (len(set(names)), numbers) == (1, tuple(range(len(events))))
    first = data_of(events)[0]
    id = first.get("message", first)["id"]
    assert names[0] == id
    for number in (-1, *numbers):
        rest = "".join(f"{event}\n\n" for event in events[number + 1 :])
        query = {"stream": "true", "starting_after": str(number)}
        assert (await durable.get(f"{path}/{id}", params=query)).text == rest
    named = {"Last-Event-ID": f"{id}:2"}
    rest = "".join(f"{event}\n\n" for event in events[3:])
    assert (await durable.get(f"{path}/{id}?stream=true", headers=named)).text == rest
    admitted = len(engine.admitted)
    assert (await durable.post(path, json=asked | {"stream": True}, headers=named)).text == rest
    assert len(engine.admitted) == admitted, "nothing was begun anew"


@pytest.mark.parametrize("which", REQUESTS)
async def test_it_says_what_it_says_without_a_journal(
    engine: FakeEngine, client: httpx.AsyncClient, durable: httpx.AsyncClient, which: str
) -> None:
    path, asked = REQUESTS[which]
    lengths(engine, asked)
    streams = [await each.post(path, json=asked | {"stream": True}) for each in (client, durable)]
    assert "id: " not in streams[0].text
    plain, kept = (events_of(response.text) for response in streams)
    assert texts_of(plain) == texts_of(kept)
    assert scores_of(plain) == scores_of(kept)
    reasons = [
        sorted(
            (choice["index"], choice["finish_reason"])
            for chunk in data_of(each)
            for choice in chunk["choices"]
            if choice["finish_reason"]
        )
        for each in (plain, kept)
    ]
    assert reasons[0] == reasons[1]
    asked = {name: value for name, value in asked.items() if name != "stream_options"}
    wholes = [(await each.post(path, json=asked)).json() for each in (client, durable)]
    id = wholes[1]["id"]
    assert (await durable.get(f"{path}/{id}")).json() == wholes[1]
    for whole in wholes:
        del whole["id"], whole["created"]
        for choice in whole["choices"]:
            for call in choice.get("message", {}).get("tool_calls") or ():
                del call["id"]
    assert wholes[0] == wholes[1]


async def test_a_message_says_what_it_says_without_a_journal(
    engine: FakeEngine, client: httpx.AsyncClient, durable: httpx.AsyncClient
) -> None:
    for asked in (asked for _, asked in MESSAGE_REQUESTS.values()):
        lengths(engine, asked)
        bodies = [(await each.post(MESSAGE, json=asked)).json() for each in (client, durable)]
        assert (await durable.get(f"{MESSAGE}/{bodies[1]['id']}")).json() == bodies[1]
        streams = [
            data_of(events_of((await each.post(MESSAGE, json=asked | {"stream": True})).text))
            for each in (client, durable)
        ]
        for body in (*bodies, *(events[0]["message"] for events in streams)):
            del body["id"]
        for block in (block for body in bodies for block in body["content"]):
            assert block.pop("id", "toolu_").startswith("toolu_")
        assert bodies[0] == bodies[1]
        for event in (event for events in streams for event in events):
            event.get("content_block", {}).pop("id", None)
        assert streams[0] == streams[1]


async def test_errors_of_messages_have_their_form(engine: FakeEngine, durable: httpx.AsyncClient) -> None:
    engine.fail_after, engine.failure = 3, EngineDead("the engine has failed: x")
    headers = {"X-Request-Id": "mine"}
    events = events_of((await durable.post(MESSAGE, json=TALK | {"stream": True}, headers=headers)).text)
    assert events[-1].splitlines()[1] == "event: error"
    assert data_of(events)[-1]["error"]["type"] == "api_error"
    whole = await durable.get(f"{MESSAGE}/msg_mine")
    assert (whole.status_code, whole.json()["error"]["type"]) == (500, "api_error")
    deleted = await durable.delete(f"{MESSAGE}/msg_mine")
    assert deleted.json() == {"id": "msg_mine", "type": "message_deleted"}
    gone = await durable.get(f"{MESSAGE}/msg_mine")
    assert (gone.status_code, gone.json()["error"]["type"]) == (404, "not_found_error")


@pytest.mark.parametrize("which", ["chat-logprobs", "completion-logprobs", "message"])
async def test_what_came_with_the_tokens_is_kept_over_a_restart(tmp_path: Path, which: str) -> None:
    """Scores and cached tokens stay those that the client has seen, whatever the next process finds."""
    path, asked = (REQUESTS | MESSAGE_REQUESTS)[which]
    journal, engines = str(tmp_path / "answers.sqlite"), (FakeEngine(), FakeEngine())
    engines[0].hold_after = 5
    engines[1].logprob, engines[1].num_cached_tokens = -0.25, 1
    headers = {"X-Request-Id": "mine"}
    id = {CHAT: "chatcmpl-mine", COMPLETION: "cmpl-mine", MESSAGE: "msg_mine"}[path]
    async with serving(engines[0], journal=journal) as url, httpx.AsyncClient(base_url=url) as client:
        async with client.stream("POST", path, json=asked | {"stream": True}, headers=headers):
            await engines[0].held.wait()
        engines[0].state = EngineState.STOPPING
    async with serving(engines[1], journal=journal) as url, httpx.AsyncClient(base_url=url) as client:
        events = events_of((await client.get(f"{path}/{id}?stream=true")).text)
    assert [number_of(event)[1] for event in events] == list(range(len(events)))
    if path == MESSAGE:
        assert data_of(events)[0]["message"]["usage"]["cache_read_input_tokens"] == 2
        return
    scores = json.dumps(scores_of(events)[0])
    assert 0 < scores.index("-0.5") < scores.rindex("-0.5") < scores.index("-0.25")


async def test_an_answer_goes_on_without_its_client(engine: FakeEngine, durable: httpx.AsyncClient) -> None:
    lengths(engine, HELLO)
    engine.hold_after = 5
    headers = {"X-Request-Id": "mine"}
    async with durable.stream("POST", CHAT, json=HELLO | {"stream": True}, headers=headers) as response:
        assert response.status_code == 200
        await engine.held.wait()
    engine.release.set()
    rest = await durable.get(f"{CHAT}/chatcmpl-mine?stream=true")
    assert texts_of(events_of(rest.text)) == {0: ANSWER}
    assert engine.aborted == 0


async def test_the_session_of_a_client_counts_here_too(
    engine: FakeEngine, durable: httpx.AsyncClient
) -> None:
    await durable.post(CHAT, json=HELLO, headers={SESSION_HEADER: "mine"})
    await durable.post(COMPLETION, json={"prompt": "x", "max_tokens": 3})
    assert engine.sessions == ["mine", ""]


async def test_a_name_that_is_taken(engine: FakeEngine, durable: httpx.AsyncClient) -> None:
    headers = {"X-Request-Id": "mine"}
    first, second = [(await durable.post(CHAT, json=HELLO, headers=headers)).json()["id"] for _ in range(2)]
    assert first == "chatcmpl-mine"
    assert second.startswith("chatcmpl-mine-")


async def test_delete_ends_it_and_forgets_it(engine: FakeEngine, durable: httpx.AsyncClient) -> None:
    engine.hold_after = 5
    place = f"{CHAT}/chatcmpl-mine"
    headers = {"X-Request-Id": "mine"}
    async with durable.stream("POST", CHAT, json=HELLO | {"stream": True}, headers=headers) as response:
        await engine.held.wait()
        deleted = (await durable.delete(place)).json()
        assert deleted == {"id": "chatcmpl-mine", "object": "chat.completion.deleted", "deleted": True}
        rest = events_of((await response.aread()).decode())
    assert data_of(rest)[-1]["choices"][0]["finish_reason"] == "abort"
    assert engine.aborted == 1
    for gone in (await durable.get(place), await durable.delete(place)):
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")
    again = await durable.post(
        CHAT, json=HELLO | {"stream": True}, headers={"Last-Event-ID": "chatcmpl-mine:1"}
    )
    assert again.status_code == 404, "an unknown stream is not begun anew"


async def test_an_answer_is_of_its_route(durable: httpx.AsyncClient) -> None:
    id = (await durable.post(CHAT, json=HELLO)).json()["id"]
    assert (await durable.get(f"{COMPLETION}/{id}")).status_code == 404
    assert (await durable.get(f"/v1/responses/{id}")).status_code == 404
    bad = await durable.get(f"{CHAT}/{id}", params={"stream": "true", "starting_after": "x"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "starting_after")


async def test_what_is_not_stored(durable: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    for path, asked in ((CHAT, HELLO), (MESSAGE, TALK)):
        response = await durable.post(path, json=asked | {"store": False, "stream": True})
        assert (response.status_code, "id: " in response.text) == (200, False)
        response = await client.post(path, json=asked | {"store": True})
        assert (response.status_code, "store" in response.json()["error"]["message"]) == (400, True)


async def test_a_key_sees_what_it_asked_for(engine: FakeEngine, tmp_path: Path) -> None:
    options = {"api_key": ("one", "two"), "journal": str(tmp_path / "answers.sqlite")}
    one, two = {"Authorization": "Bearer one"}, {"Authorization": "Bearer two"}
    async with serving(engine, **options) as url, httpx.AsyncClient(base_url=url) as client:
        place = f"{CHAT}/{(await client.post(CHAT, json=HELLO, headers=one)).json()['id']}"
        assert (await client.get(place, headers=two)).status_code == 404
        assert (await client.delete(place, headers=two)).status_code == 404
        assert (await client.get(place, headers=one)).status_code == 200


async def test_what_the_engine_refuses_keeps_its_status(
    engine: FakeEngine, durable: httpx.AsyncClient
) -> None:
    long = {"prompt": "x" * 600, "stream": True}
    response = await durable.post(COMPLETION, json=long, headers={"X-Request-Id": "mine"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert (await durable.get(f"{COMPLETION}/cmpl-mine")).status_code == 404
    engine.refuse_generation = QueueFull(8, 8, retry_after=1.2)
    assert (await durable.post(CHAT, json=HELLO)).status_code == 429


async def test_a_failure_is_told_at_any_time(engine: FakeEngine, durable: httpx.AsyncClient) -> None:
    engine.fail_after, engine.failure = 3, EngineDead("the engine has failed: x")
    headers = {"X-Request-Id": "mine"}
    events = events_of((await durable.post(CHAT, json=HELLO | {"stream": True}, headers=headers)).text)
    assert data_of(events)[-1]["error"]["code"] == "engine_dead"
    again = await durable.get(f"{CHAT}/chatcmpl-mine", params={"stream": "true", "starting_after": "1"})
    assert events_of(again.text) == events[2:]
    whole = await durable.get(f"{CHAT}/chatcmpl-mine")
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "engine_dead")


async def test_a_full_journal_is_an_error(
    engine: FakeEngine, durable: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Journal, **what: Any) -> None:
        raise JournalFull("answers.sqlite: database or disk is full")

    engine.hold_after = 5
    async with durable.stream("POST", CHAT, json=HELLO | {"stream": True}) as response:
        await engine.held.wait()
        monkeypatch.setattr(Journal, "write", full)
        refused = await durable.post(COMPLETION, json={"prompt": "x", "max_tokens": 3})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "journal_full")
        engine.hold_after = None
        assert (await durable.post(CHAT, json=HELLO | {"store": False})).status_code == 200
        engine.release.set()
        last = data_of(events_of((await response.aread()).decode()))[-1]
    assert last.get("error", {"code": "journal_full"})["code"] == "journal_full"
