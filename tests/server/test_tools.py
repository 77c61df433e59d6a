"""Tools and reasoning on a fake engine: what the model is told, and how its answer is read."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine

from ullm.engine.output import Output
from ullm.grammars.compiler import compile_grammar
from ullm.parsing.formats import ChatFormat
from ullm.parsing.hermes import HermesParser
from ullm.server.api.chat_choice import ChoiceParts

URL = "/v1/chat/completions"
WEATHER = {
    "name": "weather",
    "description": "The weather of a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
CLOCK = {"name": "clock"}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, CLOCK)]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln"}}\n</tool_call>'
TWO = f'Let me see.\n{CALL}\n<tool_call>\n{{"name": "clock", "arguments": {{}}}}\n</tool_call>'


def say(engine: FakeEngine, text: str) -> None:
    engine.script = lambda index: engine._tokenizer.plain(text)


async def ask(client: httpx.AsyncClient, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, **fields}
    response = await client.post(URL, json=body)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        return response.json()["choices"][0]
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line[6:])["choices"][0] for line in lines]


def called(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]


async def test_a_call(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    say(engine, CALL)
    choice = await ask(client)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert called(choice["message"]) == [("weather", '{"place": "Köln"}')]
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert engine._tokenizer.seen[-1]["tools"] == TOOLS


async def test_calls_as_a_stream(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    """The name comes first, with the id and no arguments; these follow in pieces."""
    say(engine, TWO)
    choices = await ask(client, stream=True)
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Let me see."
    pieces = [each for choice in choices for each in choice["delta"].get("tool_calls", [])]
    first = [piece for piece in pieces if "id" in piece]
    assert [(p["index"], p["function"]) for p in first] == [
        (0, {"name": "weather", "arguments": ""}),
        (1, {"name": "clock", "arguments": ""}),
    ]
    for index, arguments in enumerate(('{"place": "Köln"}', "{}")):
        own = [piece for piece in pieces if piece["index"] == index]
        assert own[0] in first
        assert "".join(piece["function"]["arguments"] for piece in own) == arguments
    assert len(pieces) > 8, "arguments come as they are written"
    assert choices[-1]["finish_reason"] == "tool_calls"
    whole = await ask(client)
    assert called(whole["message"]) == [("weather", '{"place": "Köln"}'), ("clock", "{}")]
    assert whole["message"]["content"] == "Let me see."


async def test_text_stays_text(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    say(engine, "A <tool_call> is nothing.")
    choice = await ask(client)
    assert choice["message"] == {"role": "assistant", "content": "A <tool_call> is nothing."}
    assert choice["finish_reason"] == "stop"
    say(engine, CALL)
    choice = await ask(client, tool_choice="none")
    assert choice["message"]["content"] == CALL
    assert engine._tokenizer.seen[-1]["tools"] is None


async def test_a_call_that_is_cut_is_one_that_was_cut(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    say(engine, CALL)
    choice = await ask(client, max_tokens=50)
    assert choice["finish_reason"] == "length"
    assert called(choice["message"])[0][0] == "weather"


@pytest.mark.parametrize(
    ("text", "stop_reason", "reason"),
    [
        (CALL, "</tool_call>", "tool_calls"),
        (CALL, None, "tool_calls"),
        (CALL.partition("place")[0], "place", "stop"),
        (CALL.partition(', "arg')[0], ', "arg', "stop"),
    ],
)
def test_a_stop_string_within_a_call(text: str, stop_reason: str | None, reason: str) -> None:
    parts = ChoiceParts(lambda: HermesParser({}), legacy=False)
    output = Output(index=0, text=text, token_ids=[1], finish_reason="stop", stop_reason=stop_reason)
    parts.add(parts.read(output))
    assert parts.finish_reason(output) == reason


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"tool_choice": "required"}, {"weather", "clock"}),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, {"clock"}),
        ({"parallel_tool_calls": False}, {"weather", "clock"}),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "weather"}}],
                }
            },
            {"weather"},
        ),
        ({"tools": [{"type": "function", "function": {**WEATHER, "strict": True}}]}, {"weather"}),
    ],
)
async def test_calls_are_constrained_where_they_must_be_valid(
    engine: FakeEngine, client: httpx.AsyncClient, fields: dict[str, Any], allowed: set[str]
) -> None:
    say(engine, CALL)
    await ask(client, **fields)
    form = engine.admitted[-1].params.structured_outputs
    assert form is not None
    grammar = compile_grammar(form)
    assert {name for name in ("weather", "clock") if f'\\"{name}\\"' in grammar} == allowed
    assert "strict" not in str(engine._tokenizer.seen[-1]["tools"])


async def test_nothing_is_constrained_without_need(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    say(engine, CALL)
    await ask(client, tool_choice="auto")
    assert engine.admitted[-1].params.structured_outputs is None


async def test_the_older_form(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    say(engine, CALL)
    fields = {"tools": None, "functions": [WEATHER], "function_call": {"name": "weather"}}
    choice = await ask(client, **fields)
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": '{"place": "Köln"}'}
    choices = await ask(client, stream=True, **fields)
    pieces = [choice["delta"]["function_call"] for choice in choices if "function_call" in choice["delta"]]
    assert pieces[0] == {"name": "weather", "arguments": ""}
    assert "".join(piece["arguments"] for piece in pieces) == '{"place": "Köln"}'


HISTORY: list[dict[str, Any]] = [
    {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "g", "arguments": {"a": 1}}}]},
    {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": None}}]},
    {"role": "assistant", "content": None, "refusal": "No."},
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "assistant", "content": None},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "function", "name": "f", "content": "42"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "unfin'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "42"},
    {"role": "assistant", "content": "x", "reasoning_content": "hm"},
    {"role": "assistant", "content": "x", "reasoning": "hm"},
]


@pytest.mark.parametrize("turn", HISTORY)
async def test_earlier_turns_are_taken(
    engine: FakeEngine, client: httpx.AsyncClient, turn: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": "Hi"}, turn, {"role": "user", "content": "Go on"}]
    await ask(client, messages=messages, tools=None)
    seen = engine._tokenizer.seen[-1]["messages"][1]
    assert seen["role"] == ("tool" if turn["role"] == "function" else turn["role"])
    if "refusal" in str(turn):
        assert seen["content"] == "No."
    if "hm" in str(turn):
        assert seen["reasoning_content"] == "hm"
    if "unfin" in str(turn):
        assert seen["tool_calls"][0]["function"]["arguments"] == '{"a": "unfin'
    if "'g'" in str(turn):
        assert seen["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    elif "'c'" in str(turn) and "None}" in str(turn):
        assert seen["tool_calls"][0]["function"]["arguments"] == {}
    if "function_call" in turn:
        assert seen["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


async def test_reasoning_is_told_from_the_answer(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine._tokenizer.chat_format = ChatFormat(reasons=True, describes_tools=True)
    say(engine, f"<think>\nhm\n</think>\n\n{CALL}")
    choice = await ask(client)
    assert choice["message"]["reasoning_content"] == choice["message"]["reasoning"] == "hm"
    assert called(choice["message"]) == [("weather", '{"place": "Köln"}')]
    say(engine, "<think>hm</think>Yes")
    choices = await ask(client, stream=True, tools=None)
    assert "".join(choice["delta"].get("reasoning_content") or "" for choice in choices) == "hm"
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Yes"


async def test_reasoning_is_not_sent_where_it_is_not_wanted(
    engine: FakeEngine, client: httpx.AsyncClient
) -> None:
    engine._tokenizer.chat_format = ChatFormat(reasons=True, describes_tools=True)
    say(engine, f"<think>\nhm\n</think>\n\nSee. {CALL}")
    choice = await ask(client, include_reasoning=False)
    assert "hm" not in json.dumps(choice)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("See.", "tool_calls")
    choices = await ask(client, include_reasoning=False, stream=True)
    assert "reasoning" not in json.dumps(choices)
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "See."
    assert any(choice["delta"].get("tool_calls") for choice in choices)


async def test_a_form_begins_after_reasoning_that_the_prompt_opened(
    engine: FakeEngine, client: httpx.AsyncClient
) -> None:
    engine._tokenizer.chat_format = ChatFormat(reasons=True)
    say(engine, 'hm</think>\n{"a": 1}')
    messages = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "<think>"}]
    choice = await ask(client, messages=messages, tools=None, response_format={"type": "json_object"})
    form = engine.admitted[-1].params.structured_outputs
    assert form is not None
    if choice["message"].get("reasoning_content"):
        assert form.after == "</think>"
        assert choice["message"]["content"].strip() == '{"a": 1}'


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": "f"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": 1}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [1]}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        (
            {
                "tools": [
                    *TOOLS,
                    {"type": "function", "function": {"name": "clock", "description": "another"}},
                ]
            },
            f"tools[{len(TOOLS)}].function.name",
        ),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"function_call": {"name": "f"}, "tools": None}, "function_call"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, **fields}
    response = await client.post(URL, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
