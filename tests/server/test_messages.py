"""``/v1/messages`` on a fake engine: turns, blocks, tools, thinking, events, usage and errors."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fake_engine import ANSWER, CONTEXT_LEN, FakeEngine, serving

from ullm.engine.state import EngineState
from ullm.errors import EngineDead
from ullm.grammars.compiler import compile_grammar
from ullm.parsing.formats import ChatFormat

pytestmark = pytest.mark.process

URL = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
HELLO = {"role": "user", "content": "Hello"}
WEATHER = {
    "name": "weather",
    "description": "The weather of a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
CLOCK = {"name": "clock", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln"}}\n</tool_call>'
TWO = f'Let me see.\n{CALL}\n<tool_call>\n{{"name": "clock", "arguments": {{}}}}\n</tool_call>'


def say(engine: FakeEngine, text: str) -> None:
    engine.script = lambda index: engine._tokenizer.plain(text)


async def post(client: httpx.AsyncClient, url: str = URL, **fields: Any) -> httpx.Response:
    body = {"model": "fake", "max_tokens": 300, "messages": [HELLO], **fields}
    if url == COUNT:
        body.pop("max_tokens")
    return await client.post(url, json={k: v for k, v in body.items() if v is not ...})


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await post(client, **fields)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def events(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    response = await post(client, stream=True, **fields)
    assert response.status_code == 200, response.text
    return parsed(response.text)


def parsed(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream; each is named by its type."""
    found = []
    for each in text.split("\n\n"):
        if each:
            name, data = each.splitlines()
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def joined(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the blocks that the events of a stream make, as Anthropic's clients put them together."""
    blocks: list[dict[str, Any]] = []
    for each in found:
        if each["type"] == "content_block_start":
            assert each["index"] == len(blocks)
            blocks.append({**each["content_block"]})
        elif each["type"] == "content_block_delta":
            assert each["index"] == len(blocks) - 1
            delta = dict(each["delta"])
            kind = delta.pop("type").removesuffix("_delta")
            (name,) = delta
            key = {"input_json": "json"}.get(kind, name)
            blocks[-1][key] = blocks[-1].get(key, "") + delta[name]
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("json", "{}"))
    return blocks


def turns(engine: FakeEngine) -> list[dict[str, Any]]:
    """Return the conversation that the template got last."""
    found: list[dict[str, Any]] = engine._tokenizer.seen[-1]["messages"]
    return found


# --- answers ---------------------------------------------------------------------------------------


async def test_the_whole_answer(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    found = await ask(client, temperature=0.5, top_p=0.9, top_k=7, seed=3, metadata={"user_id": "u"})
    prompt = len(engine.admitted[-1].prompt_token_ids)
    assert found.pop("id").startswith("msg_")
    assert found == {
        "type": "message",
        "role": "assistant",
        "model": "fake",
        "content": [{"type": "text", "text": ANSWER, "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": prompt - 2,
            "cache_read_input_tokens": 2,
            "cache_creation_input_tokens": 0,
            "output_tokens": len(ANSWER.encode()),
        },
    }
    params = engine.admitted[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.9, 7, 3)


async def test_the_events_in_order(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    found = await events(client)
    kinds = [each["type"] for each in found]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    begun = found[0]["message"]
    prompt = len(engine.admitted[-1].prompt_token_ids)
    assert (begun["content"], begun["stop_reason"]) == ([], None)
    assert begun["usage"]["input_tokens"] + begun["usage"]["cache_read_input_tokens"] == prompt
    assert [block["text"] for block in joined(found)] == [ANSWER]
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == len(ANSWER.encode())


async def test_limits(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    assert (await ask(client, max_tokens=3))["stop_reason"] == "max_tokens"
    say(engine, "x" * CONTEXT_LEN)
    found = await ask(client, max_tokens=10**6)
    assert found["stop_reason"] == "model_context_window_exceeded"
    prompt = len(engine.admitted[-1].prompt_token_ids)
    assert prompt + found["usage"]["output_tokens"] == CONTEXT_LEN
    assert engine.admitted[-1].params.max_tokens == CONTEXT_LEN - prompt


async def test_an_answer_that_was_cut_short_is_a_pause(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    """Whatever ends an answer that neither it nor the client has ended."""
    answer = engine.script(0)
    for reason in ("timeout", "abort"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "fake_engine._end", lambda n, s, limit, r=reason: r if n + 1 == len(answer) else None
            )
            found = await ask(client)
            assert (found["stop_reason"], found["stop_cause"]) == ("pause_turn", reason)
            delta = (await events(client))[-2]["delta"]
            assert delta == {"stop_reason": "pause_turn", "stop_sequence": None, "stop_cause": reason}


async def test_token_counts_are_those_of_the_prompt(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    fields = {"system": "Be brief.", "tools": [CLOCK], "thinking": {"type": "enabled", "budget_tokens": 9}}
    await ask(client, **fields)
    response = await post(client, COUNT, **fields)
    assert response.json() == {"input_tokens": len(engine.admitted[-1].prompt_token_ids)}
    assert len(engine.admitted) == 1


# --- turns -----------------------------------------------------------------------------------------


async def test_blocks_become_turns(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    text = {"type": "text", "text": "One", "cache_control": {"type": "ephemeral"}}
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"place": "Köln"}}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    secret = {"type": "redacted_thinking", "data": "xyz"}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Rain"}
    failed = {**result, "tool_use_id": "toolu_2", "content": [text, text], "is_error": True}
    await ask(
        client,
        system=[text, {"type": "text", "text": "Two"}],
        messages=[
            {"role": "user", "content": [text, {"type": "text", "text": "Two"}]},
            HELLO,
            {"role": "assistant", "content": [thought, secret, {"type": "text", "text": "Let me see."}]},
            {"role": "assistant", "content": [{**call, "id": "toolu_2"}, call]},
            {"role": "user", "content": [failed, result, {"type": "text", "text": "So?"}]},
        ],
    )
    function = {"name": "weather", "arguments": {"place": "Köln"}}
    assert turns(engine) == [
        {"role": "system", "content": "One\nTwo"},
        {"role": "user", "content": "One\nTwo\nHello"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": id, "type": "function", "function": function} for id in ("toolu_2", "toolu_1")
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_2", "name": "weather", "content": "Error: One\nOne"},
        {"role": "tool", "tool_call_id": "toolu_1", "name": "weather", "content": "Rain"},
        {"role": "user", "content": "So?"},
    ]


async def test_the_last_message_goes_on(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine._tokenizer.chat_format = ChatFormat(describes_tools=True, reads_calls=True, reasons=True)
    say(engine, "\n\n<think> is a tag")
    begun = {"role": "assistant", "content": "I begin"}
    found = await ask(client, messages=[HELLO, begun])
    assert found["content"][0]["text"] == "\n\n<think> is a tag", "what is new, as it is"
    assert engine._tokenizer.seen[-1]["kwargs"] == {"continue_final_message": True}
    assert engine._tokenizer.decode(engine.admitted[-1].prompt_token_ids).endswith("I begin")
    await ask(client, messages=[HELLO, {"role": "assistant", "content": ""}])
    assert turns(engine) == [HELLO], "an answer that begins with nothing"


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image"}]}
                        ],
                    }
                ]
            },
            "messages[0].content[0].content[0]",
        ),
        (
            {"messages": [HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}]},
            "messages[1].content[0].name",
        ),
        (
            {
                "messages": [
                    HELLO,
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "y"}]},
                ]
            },
            "messages[1]",
        ),
        (
            {"messages": [HELLO, {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "messages[1]",
        ),
        ({"messages": [{"role": "assistant", "content": ""}]}, "messages[0]"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"max_tokens": ...}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["x" * 9999]}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"thread": {"id": "x"}}, "thread"),
    ],
    ids=str,
)
async def test_what_is_refused_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], place: str
) -> None:
    response = await post(client, **fields)
    assert response.status_code == 400, response.text
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert place in body["error"]["message"]


# --- tools and thinking ----------------------------------------------------------------------------


async def test_calls(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    say(engine, TWO)
    found = await ask(client, tools=[WEATHER, CLOCK])
    text, weather, clock = found["content"]
    assert found["stop_reason"] == "tool_use"
    assert text["text"] == "Let me see."
    assert weather.pop("id").startswith("toolu_")
    assert weather == {"type": "tool_use", "name": "weather", "input": {"place": "Köln"}}
    assert (clock["name"], clock["input"]) == ("clock", {})
    told = engine._tokenizer.seen[-1]["tools"][0]["function"]
    assert told == {
        "name": "weather",
        "description": WEATHER["description"],
        "parameters": WEATHER["input_schema"],
    }
    streamed = await events(client, tools=[WEATHER, CLOCK])
    assert [{**block, "id": 0} for block in joined(streamed)] == [
        {**block, "id": 0} for block in (text, {**weather, "id": ""}, clock)
    ]
    begins = [each["content_block"] for each in streamed if each["type"] == "content_block_start"]
    assert [block.get("input") for block in begins] == [None, {}, {}], "arguments come as deltas"
    assert streamed[-2]["delta"]["stop_reason"] == "tool_use"


async def test_arguments_that_are_no_json(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    say(engine, CALL)
    found = await ask(client, tools=[WEATHER], max_tokens=55)
    assert found["stop_reason"] == "max_tokens"
    assert found["content"][0]["input"]["INVALID_JSON"].startswith('{"pla')


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"tool_choice": {"type": "any"}}, {"weather", "clock"}),
        ({"tool_choice": {"type": "tool", "name": "clock"}}, {"clock"}),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, {"weather", "clock"}),
        ({"tools": [{**WEATHER, "strict": True}]}, {"weather"}),
        ({"tool_choice": {"type": "auto"}}, None),
    ],
    ids=["any", "named", "one", "strict", "auto"],
)
async def test_choices_of_tools(
    engine: FakeEngine, client: httpx.AsyncClient, fields: dict[str, Any], allowed: set[str] | None
) -> None:
    say(engine, CALL)
    await ask(client, **{"tools": [WEATHER, CLOCK], **fields})
    form = engine.admitted[-1].params.structured_outputs
    if allowed is None:
        assert form is None
        return
    assert form is not None
    grammar = compile_grammar(form)
    assert {name for name in ("weather", "clock") if f'\\"{name}\\"' in grammar} == allowed


async def test_no_tools_are_told_of_if_none_may_be_called(
    engine: FakeEngine, client: httpx.AsyncClient
) -> None:
    say(engine, CALL)
    found = await ask(client, tools=[WEATHER], tool_choice={"type": "none"})
    assert found["content"][0]["text"] == CALL
    assert engine._tokenizer.seen[-1]["tools"] is None


async def test_thinking(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine._tokenizer.chat_format = ChatFormat(describes_tools=True, reads_calls=True, reasons=True)
    say(engine, f"<think>\nHm, well.\n</think>\n\n{TWO}")
    found = await ask(client, tools=[WEATHER, CLOCK], thinking={"type": "enabled", "budget_tokens": 99})
    assert engine._tokenizer.seen[-1]["kwargs"] == {"enable_thinking": True}
    assert engine.admitted[-1].params.thinking_token_budget == 99
    assert found["content"][0] == {"type": "thinking", "thinking": "Hm, well.", "signature": ""}
    assert [block["type"] for block in found["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    streamed = joined(await events(client, tools=[WEATHER, CLOCK], thinking={"type": "disabled"}))
    assert engine._tokenizer.seen[-1]["kwargs"] == {"enable_thinking": False}
    assert streamed[0] == found["content"][0]
    assert [block["type"] for block in streamed] == [block["type"] for block in found["content"]]


async def test_a_budget_of_thinking_where_there_is_none(
    engine: FakeEngine, client: httpx.AsyncClient
) -> None:
    await ask(client, thinking={"type": "enabled", "budget_tokens": 99})
    assert engine.admitted[-1].params.thinking_token_budget is None, "the model does not reason"
    engine._tokenizer.chat_format = ChatFormat(reasons=True)
    response = await post(client, thinking={"type": "enabled", "budget_tokens": -2})
    assert response.status_code == 400
    assert "thinking.budget_tokens must be" in response.json()["error"]["message"]


async def test_thinking_that_is_not_shown(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine._tokenizer.chat_format = ChatFormat(reasons=True)
    say(engine, "<think>Hm.</think>Well.")
    thinking = {"type": "adaptive", "display": "omitted"}
    found = await ask(client, thinking=thinking)
    assert [block.get("thinking") for block in found["content"]] == ["", None]
    streamed = joined(await events(client, thinking=thinking))
    assert streamed == found["content"]


async def test_a_system_turn_among_the_others(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    system = {"role": "system", "content": "Now"}
    await ask(client, system="First", messages=[system, HELLO, system, HELLO])
    assert [turn["content"] for turn in turns(engine)] == ["First\nNow", "Hello", "Now", "Hello"]


async def test_the_form_of_the_answer(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    for fields in ({"output_config": {"format": form, "effort": "low"}}, {"output_format": form}):
        await ask(client, **fields)
        assert engine.admitted[-1].params.structured_outputs is not None
    assert engine._tokenizer.seen[0]["kwargs"] == {"reasoning_effort": "low"}
    response = await post(client, output_config={"format": form}, output_format=form)
    assert "output_format" in response.json()["error"]["message"]


# --- errors ----------------------------------------------------------------------------------------


async def test_errors_have_anthropics_form(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    response = await post(client, model="other")
    assert response.status_code == 404
    body = response.json()
    assert body["error"]["type"] == "not_found_error"
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    assert (await client.get(URL)).json()["error"]["type"] == "invalid_request_error"
    response = await client.post(f"{URL}/batches", json={})  # as an id, it can be read and deleted
    assert (response.status_code, response.json()["error"]["type"]) == (405, "invalid_request_error")
    engine.fill_queue()
    response = await post(client)
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(response.headers["retry-after"]) >= 1
    engine.refuse, engine.state = None, EngineState.STARTING
    for url in (URL, COUNT):
        response = await post(client, url)
        assert (response.status_code, response.json()["error"]["type"]) == (529, "overloaded_error")
    chat = await client.post("/v1/chat/completions", json={"messages": [HELLO]})
    assert (chat.status_code, chat.json()["error"]["code"]) == (503, "not_ready"), "OpenAI's own stays"


async def test_the_key(engine: FakeEngine) -> None:
    async with serving(engine, api_key="secret") as url, httpx.AsyncClient(base_url=url) as client:
        response = await post(client)
        assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
        client.headers.update({"x-api-key": "secret", "anthropic-version": "2023-06-01"})
        assert (await post(client)).status_code == 200


async def test_an_error_within_a_stream(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine.fail_after, engine.failure = 5, EngineDead("the last replica is gone")
    found = await events(client)
    assert found[0]["type"] == "message_start"
    assert found[-1]["type"] == "error"
    assert found[-1]["error"]["type"] == "api_error"
    engine.fail_after = 0
    assert (await post(client, stream=True)).status_code == 500, "before the first event, a status"


async def test_pings_after_a_silence(engine: FakeEngine) -> None:
    engine.hold_after = 5
    async with serving(engine, sse_keep_alive=0.01) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"max_tokens": 99, "messages": [HELLO], "stream": True}
        lines = []
        async with client.stream("POST", URL, json=body) as response:
            async for line in response.aiter_lines():
                lines.append(line)
                if line == 'data: {"type":"ping"}':
                    engine.release.set()
    found = parsed("\n".join(lines))
    assert found[-1]["type"] == "message_stop"
    assert [block["text"] for block in joined(found)] == [ANSWER]


async def test_a_client_that_leaves_ends_its_answer(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine.hold_after = 5
    body = {"max_tokens": 99, "messages": [HELLO], "stream": True}
    async with client.stream("POST", URL, json=body) as response:
        assert response.status_code == 200
        await engine.held.wait()
    await engine.all_gone.wait()
    assert engine.aborted == 1
