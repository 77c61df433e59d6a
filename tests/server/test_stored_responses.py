"""``/v1/responses`` on a fake engine: the object, the events, what is stored for whom, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import ANSWER, FakeEngine, serving

from ullm.errors import EngineDead, InvalidParameter
from ullm.journal.journal import Journal, JournalFull
from ullm.parsing.formats import ChatFormat

URL = "/v1/responses"


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def last_id(engine: FakeEngine) -> str:
    """Return the id of the response that was admitted last."""
    return engine.admitted[-1].request_id.rsplit("-", 2)[0]


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"input": "Hello", **fields})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


async def test_the_whole_answer(client: httpx.AsyncClient) -> None:
    found = await ask(client, metadata={"a": "b"}, temperature=0.5, instructions="Be brief.")
    assert found["object"] == "response"
    assert found["status"] == "completed"
    assert text_of(found) == ANSWER
    assert (found["temperature"], found["metadata"], found["instructions"]) == (0.5, {"a": "b"}, "Be brief.")
    assert found["usage"]["output_tokens"] == len(ANSWER.encode())
    assert found["usage"]["input_tokens_details"] == {"cached_tokens": 2}
    assert (await client.get(f"{URL}/{found['id']}")).json() == found


async def test_an_answer_that_was_cut(client: httpx.AsyncClient) -> None:
    found = await ask(client, max_output_tokens=3)
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert found["output"][0]["status"] == "incomplete"


async def test_the_events_in_order(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json={"input": "Hello", "stream": True})
    assert response.headers["content-type"] == "text/event-stream"
    events = events_of(response.text)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers))
    assert "".join(event.get("delta", "") for event in events) == ANSWER
    assert events[-1]["response"]["status"] == "completed"
    assert text_of(events[-1]["response"]) == ANSWER


async def test_a_stream_can_be_taken_up_at_every_event(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json={"input": "Hello", "stream": True})
    events = events_of(response.text)
    place = f"{URL}/{events[0]['response']['id']}"
    for index, event in enumerate(events):
        number = event["sequence_number"]
        rest = await client.get(place, params={"stream": "true", "starting_after": number})
        by_header = await client.get(place, params={"stream": "true"}, headers={"Last-Event-ID": str(number)})
        assert rest.text == by_header.text
        assert rest.headers["content-type"] == "text/event-stream"  # also after the last one
        deltas = "".join(later.get("delta", "") for later in events[index + 1 :])
        assert "".join(later.get("delta", "") for later in events_of(rest.text)) == deltas
        kinds = [later["type"] for later in events[index + 1 :] if "delta" not in later]
        assert [later["type"] for later in events_of(rest.text) if "delta" not in later] == kinds


async def test_an_answer_in_the_background_goes_on_alone(
    engine: FakeEngine, client: httpx.AsyncClient
) -> None:
    engine.hold_after = 5
    begun = await ask(client, background=True)
    assert (begun["status"], begun["output"]) == ("queued", [])
    await engine.held.wait()
    place = f"{URL}/{begun['id']}"
    assert (await client.get(place)).json()["status"] == "in_progress"
    engine.release.set()
    async with client.stream("GET", place, params={"stream": "true"}) as response:
        events = events_of("\n".join([line async for line in response.aiter_lines()]))
    assert events[-1]["type"] == "response.completed"
    assert text_of((await client.get(place)).json()) == ANSWER


async def test_a_background_stream_outlives_its_client(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine.hold_after = 5
    body = {"input": "Hello", "background": True, "stream": True}
    async with client.stream("POST", URL, json=body) as response:
        assert response.status_code == 200
        await engine.held.wait()
    engine.release.set()
    place = f"{URL}/{last_id(engine)}"
    rest = await client.get(place, params={"stream": "true"})
    assert events_of(rest.text)[-1]["type"] == "response.completed"
    assert engine.aborted == 0


async def test_a_client_that_leaves_ends_its_own_answer(
    engine: FakeEngine, client: httpx.AsyncClient
) -> None:
    engine.hold_after = 5
    async with client.stream("POST", URL, json={"input": "Hello", "stream": True}) as response:
        assert response.status_code == 200
        await engine.held.wait()
    await engine.all_gone.wait()
    assert engine.aborted == 1
    found = (await client.get(f"{URL}/{last_id(engine)}")).json()
    assert found["status"] == "cancelled"


async def test_cancel_and_delete(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine.hold_after = 5
    begun = await ask(client, background=True)
    await engine.held.wait()
    place = f"{URL}/{begun['id']}"
    assert (await client.post(f"{place}/cancel")).json()["status"] == "cancelled"
    assert (await client.post(f"{place}/cancel")).json()["status"] == "cancelled"
    assert engine.aborted == 1
    assert (await client.delete(place)).json() == {"id": begun["id"], "object": "response", "deleted": True}
    for response in (
        await client.get(place),
        await client.delete(place),
        await client.post(f"{place}/cancel"),
        await client.get(f"{place}/input_items"),
        await client.post(URL, json={"input": "x", "previous_response_id": begun["id"]}),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "response_not_found"
    engine.hold_after = None
    ended = await ask(client, input="x")
    assert (await client.post(f"{URL}/{ended['id']}/cancel")).status_code == 400


async def test_a_conversation_goes_on(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    first = await ask(client, instructions="Be brief.")
    items = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "And"}, {"type": "input_text", "text": "?"}],
        },
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
    ]
    second = await ask(client, input=items, previous_response_id=first["id"], store=False)
    assert second["previous_response_id"] == first["id"]
    prompt = engine._tokenizer.decode(engine.admitted[-1].prompt_token_ids)
    assert "Be brief." not in prompt
    assert prompt.index("Hello") < prompt.index(ANSWER[:5]) < prompt.index("And")
    assert (await client.get(f"{URL}/{second['id']}")).status_code == 404, "it was not to be stored"
    shown = (await client.get(f"{URL}/{first['id']}/input_items")).json()
    assert shown["data"][0]["content"] == [{"type": "input_text", "text": "Hello"}]


async def test_pages_of_what_was_asked(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    texts = ["a", "b", "c"]
    first = await ask(client, input=[{"role": "user", "content": text} for text in texts])
    place = f"{URL}/{first['id']}/input_items"

    async def page(**query: Any) -> tuple[str, bool, Any]:
        shown = (await client.get(place, params=query)).json()
        return "".join(item["content"] for item in shown["data"]), shown["has_more"], shown["last_id"]

    begun, more, last = await page(limit=2)
    assert (begun, more) == ("ab", True)
    assert (await page(limit=2, after=last))[:2] == ("c", False)
    assert (await page(order="desc"))[:2] == ("cba", False)
    for name, value in (
        ("limit", "x"),
        ("limit", "0"),
        ("limit", "1" * 30),
        ("order", "up"),
        ("after", "nobody"),
    ):
        response = await client.get(place, params={name: value})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name


@pytest.mark.parametrize("query", ["stream=maybe", "starting_after=3", "stream=false&starting_after=3"])
async def test_a_query_that_asks_for_nothing_is_refused(client: httpx.AsyncClient, query: str) -> None:
    first = await ask(client, input="x")
    response = await client.get(f"{URL}/{first['id']}?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.rpartition("&")[2].partition("=")[0]


async def test_a_form_of_the_text(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    schema = {"type": "object", "properties": {}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    found = await ask(client, text={"format": form, "verbosity": "low"})
    assert found["text"]["format"]["schema"] == schema
    outputs = engine.admitted[-1].params.structured_outputs
    assert outputs is not None
    assert outputs.kind == "json"


async def test_a_key_sees_what_it_asked_for(engine: FakeEngine) -> None:
    async with serving(engine, api_key=("one", "two")) as url, httpx.AsyncClient(base_url=url) as client:
        one, two = {"Authorization": "Bearer one"}, {"X-Api-Key": "two"}
        found = (await client.post(URL, json={"input": "Hello"}, headers=one)).json()
        for method in ("GET", "DELETE"):
            response = await client.request(method, f"{URL}/{found['id']}", headers=two)
            assert response.status_code == 404
        assert (await client.get(f"{URL}/{found['id']}", headers={"X-Api-Key": "one"})).status_code == 200
        assert (await client.get(f"{URL}/{found['id']}")).status_code == 401


async def test_the_oldest_make_room(engine: FakeEngine) -> None:
    async with serving(engine, max_stored_answers=2) as url, httpx.AsyncClient(base_url=url) as client:
        ids = [(await ask(client))["id"] for _ in range(3)]
        statuses = [(await client.get(f"{URL}/{id}")).status_code for id in ids]
        assert statuses == [404, 200, 200]


async def test_a_failure_is_an_error_where_somebody_waits(
    engine: FakeEngine, client: httpx.AsyncClient
) -> None:
    engine.fail_after, engine.failure = 3, EngineDead("the engine has failed: x")
    response = await client.post(URL, json={"input": "Hello"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_dead"
    stream = events_of((await client.post(URL, json={"input": "Hello", "stream": True})).text)
    assert stream[-1]["type"] == "response.failed"
    assert stream[-1]["response"]["error"]["code"] == "engine_dead"
    begun = await ask(client, background=True)
    await client.get(f"{URL}/{begun['id']}", params={"stream": "true"})  # ends with it
    found = (await client.get(f"{URL}/{begun['id']}")).json()
    assert found["error"] == {"code": "engine_dead", "message": "the engine has failed: x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "input_image"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"reasoning": {"max_tokens": -2}}, "reasoning.max_tokens"),
        ({"reasoning": {"max_tokens": 2}, "thinking_token_budget": 3}, "thinking_token_budget"),
        ({"temperature": -1}, "temperature"),
        ({"background": True, "store": False}, "background"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"model": "gpt"}, "model"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ],
)
async def test_refusals_name_the_field(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await client.post(URL, json={"input": "Hello", **fields})
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("name", ["thinking_token_budget", "max_tokens"])
async def test_a_budget_of_reasoning(engine: FakeEngine, client: httpx.AsyncClient, name: str) -> None:
    reasoning = {"effort": "low", "summary": "auto"} | ({name: 7} if name == "max_tokens" else {})
    body = {"input": "Hello", "reasoning": reasoning} | ({name: 7} if name != "max_tokens" else {})
    response = await client.post(URL, json=body)
    assert "X-Ullm-Ignored-Fields" not in response.headers
    assert response.json()["reasoning"] == {"effort": "low", "summary": "auto"}
    assert engine.admitted[-1].params.thinking_token_budget == 7
    assert engine._tokenizer.seen[-1]["kwargs"] == {"reasoning_effort": "low"}


async def test_the_engine_refuses_a_budget_by_the_name_that_was_sent(
    engine: FakeEngine, client: httpx.AsyncClient
) -> None:
    engine.refuse_generation = InvalidParameter("thinking_token_budget: no token", "thinking_token_budget")
    response = await client.post(URL, json={"input": "Hello", "reasoning": {"max_tokens": 7}})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "reasoning.max_tokens")
    assert error["message"] == "reasoning.max_tokens: no token"


async def test_the_number_of_an_event_is_a_number(client: httpx.AsyncClient) -> None:
    found = await ask(client)
    place = f"{URL}/{found['id']}"
    response = await client.get(place, params={"stream": "true", "starting_after": "x"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "starting_after"


async def test_without_room_in_the_journal_only_those_that_need_it_fail(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Journal, **what: Any) -> None:
        raise JournalFull("answers.sqlite: database or disk is full")

    engine.hold_after = 5
    journal = str(tmp_path / "answers.sqlite")
    async with serving(engine, journal=journal) as url, httpx.AsyncClient(base_url=url) as client:
        begun = await ask(client, background=True)
        await engine.held.wait()
        monkeypatch.setattr(Journal, "write", full)
        engine.release.set()
        refused = await client.post(URL, json={"input": "x", "background": True})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "journal_full"
        assert text_of(await ask(client, store=False)) == ANSWER
        rest = await client.get(f"{URL}/{begun['id']}", params={"stream": "true"})
        last = events_of(rest.text)[-1]
        assert last["type"] in ("response.failed", "response.completed")
        if last["type"] == "response.failed":
            assert last["response"]["error"]["code"] == "journal_full"


WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
}
CALLS = (
    'Let me see.\n<tool_call>{"name": "weather", "arguments": {"place": "Köln"}}</tool_call>'
    '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
)


def say(engine: FakeEngine, text: str) -> None:
    engine.script = lambda index: engine._tokenizer.plain(text)


async def test_calls_of_functions_are_items(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    say(engine, CALLS)
    found = await ask(client, tools=[WEATHER])
    assert found["status"] == "completed"
    assert [item["type"] for item in found["output"]] == ["message", "function_call", "function_call"]
    first, second = found["output"][1:]
    assert (first["name"], first["arguments"]) == ("weather", '{"place": "Köln"}')
    assert first["call_id"] != second["call_id"]
    assert (await client.get(f"{URL}/{found['id']}")).json()["output"] == found["output"]
    told = engine._tokenizer.seen[-1]["tools"]
    assert told == [{"type": "function", "function": {k: v for k, v in WEATHER.items() if k != "type"}}]
    say(engine, "18 degrees")
    results = [
        {"type": "function_call_output", "call_id": each["call_id"], "output": "18"}
        for each in (first, second)
    ]
    await ask(client, input=results, previous_response_id=found["id"], tools=[WEATHER])
    turns = engine._tokenizer.seen[-1]["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool"]
    assert [call["id"] for call in turns[1]["tool_calls"]] == [first["call_id"], second["call_id"]]
    items = [{"role": "user", "content": "Hi"}, *found["output"], *results]
    await ask(client, input=items, tools=[WEATHER])
    assert [turn["role"] for turn in engine._tokenizer.seen[-1]["messages"]] == [
        turn["role"] for turn in turns
    ]


async def test_earlier_reasoning_is_handed_to_the_template(
    engine: FakeEngine, client: httpx.AsyncClient
) -> None:
    """Whether the server knows it, the client sends it back, or a client that keeps it as a summary does."""
    engine._tokenizer.chat_format = ChatFormat(reasons=True, describes_tools=True, reads_calls=True)
    say(engine, "<think>hm, the weather</think>" + CALLS)
    found = await ask(client, tools=[WEATHER])
    thought, text, *calls = found["output"]
    result = {"type": "function_call_output", "call_id": calls[0]["call_id"], "output": "18"}
    await ask(client, input=[result], previous_response_id=found["id"], tools=[WEATHER])
    known = engine._tokenizer.seen[-1]["messages"]
    assert known[1]["reasoning_content"] == "hm, the weather"
    user = {"role": "user", "content": "Hello"}
    summed = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm, the weather"}]}
    for each in (thought, summed):
        await ask(client, input=[user, each, text, *calls, result], tools=[WEATHER])
        assert engine._tokenizer.seen[-1]["messages"] == known
    await ask(client, input=[user, thought, *calls, result], tools=[WEATHER])
    without_text = engine._tokenizer.seen[-1]["messages"]
    assert without_text == [known[0], known[1] | {"content": ""}, known[2]]
    await ask(client, input=[user, {"type": "reasoning", "summary": []}, text, user], tools=[WEATHER])
    turns = engine._tokenizer.seen[-1]["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert "reasoning_content" not in turns[1]
    refused = await client.post(URL, json={"input": [{"type": "reasoning", "content": [{"type": "image"}]}]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input[0].content[0]")


@pytest.mark.parametrize(
    ("fields", "candidates"),
    [
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs", "reasoning.encrypted_content"], "top_logprobs": 2}, 2),
        ({"top_logprobs": 1}, 1),
        ({"top_logprobs": 0, "include": []}, None),
    ],
)
async def test_log_probabilities(
    engine: FakeEngine, client: httpx.AsyncClient, fields: dict[str, Any], candidates: int | None
) -> None:
    """They are those of the text's tokens, whole, streamed, and taken up at any event; calls have none."""
    engine._tokenizer.chat_format = ChatFormat(reasons=True, describes_tools=True, reads_calls=True)
    say(engine, "<think>hm</think>" + CALLS)
    found = await ask(client, tools=[WEATHER], **fields)
    assert found["top_logprobs"] == (candidates or 0)
    (scores,) = (item["content"][0]["logprobs"] for item in found["output"] if item["type"] == "message")
    if candidates is None:
        assert scores == []
        return
    assert "Let me see." in "".join(each["token"] for each in scores)
    assert all(len(each["top_logprobs"]) == candidates for each in scores)
    response = await client.post(URL, json={"input": "Hello", "stream": True, "tools": [WEATHER], **fields})
    events = events_of(response.text)
    (done,) = (event for event in events if event["type"] == "response.output_text.done")
    assert done["logprobs"] == scores
    place = f"{URL}/{events[0]['response']['id']}"
    for index, event in enumerate(events):
        params = {"stream": "true", "starting_after": event["sequence_number"]}
        rest = events_of((await client.get(place, params=params)).text)
        assert _scores(rest) == _scores(events[index + 1 :])
    assert _scores(events) == scores
    assert (await client.get(place)).json()["output"][1]["content"][0]["logprobs"] == scores


def _scores(events: list[dict[str, Any]]) -> list[Any]:
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    return [score for event in deltas for score in event["logprobs"]]


@pytest.mark.parametrize("reasons", [False, True])
async def test_a_stream_of_calls_can_be_taken_up_at_every_event(
    engine: FakeEngine, client: httpx.AsyncClient, reasons: bool
) -> None:
    engine._tokenizer.chat_format = ChatFormat(reasons=reasons, describes_tools=True, reads_calls=True)
    say(engine, ("<think>hm</think>" if reasons else "") + CALLS)
    response = await client.post(URL, json={"input": "Hi", "stream": True, "tools": [WEATHER]})
    events = events_of(response.text)
    kinds = [event["type"] for event in events]
    assert kinds.count("response.output_item.done") == 3 + reasons
    assert ("response.reasoning_text.delta" in kinds) is reasons
    usage = events[-1]["response"]["usage"]
    thought = usage["output_tokens_details"]["reasoning_tokens"]
    assert 0 < thought < usage["output_tokens"] if reasons else thought == 0
    arguments: dict[int, str] = {}
    for event in events:
        if event["type"] == "response.function_call_arguments.delta":
            index = event["output_index"]
            arguments[index] = arguments.get(index, "") + event["delta"]
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [event["arguments"] for event in done] == list(arguments.values()) == ['{"place": "Köln"}', "{}"]
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers))
    place = f"{URL}/{events[0]['response']['id']}"
    for index, number in enumerate(numbers):
        rest = await client.get(place, params={"stream": "true", "starting_after": number})
        later = [event for event in events[index + 1 :] if not event["type"].endswith("delta")]
        assert [e for e in events_of(rest.text) if not e["type"].endswith("delta")] == later
        deltas = "".join(event["delta"] for event in events[index + 1 :] if event["type"].endswith("delta"))
        found = events_of(rest.text)
        assert "".join(e["delta"] for e in found if e["type"].endswith("delta")) == deltas


async def test_a_forced_call_is_constrained(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    say(engine, CALLS)
    await ask(client, tools=[WEATHER], tool_choice={"type": "function", "name": "weather"})
    assert engine.admitted[-1].params.structured_outputs is not None


async def test_headers_are_followed(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    """As on every other route."""
    headers = {"X-Request-Timeout": "7.5", "X-Session-Id": "mine"}
    response = await client.post(URL, json={"input": "Hello"}, headers=headers)
    assert response.status_code == 200
    assert 0 < (engine.params[-1].timeout or 0) <= 7.5
    assert engine.sessions[-1] == "mine"
    for name, value in (("X-Request-Timeout", "soon"), ("X-Session-Id", "a b")):
        response = await client.post(URL, json={"input": "Hello"}, headers={name: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)
