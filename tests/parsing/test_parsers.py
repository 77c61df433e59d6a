"""Parsers of calls and of reasoning: what they find, the same however the text is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ullm.grammars.compiler import compile_grammar
from ullm.parsing.formats import FORMATS, ChatFormat, forced_calls, forced_parser, format_of, guided_calls
from ullm.parsing.hermes import HermesParser
from ullm.parsing.parts import CallArguments, CallBegin, Parser, Part, Reasoning, Text
from ullm.parsing.reasoning import ReasoningParser

TOOLS: dict[str, dict[str, Any]] = {
    "f": {"type": "object", "properties": {"a": {"type": "string"}}},
    "g": {},
}
Found = list[tuple[str, ...]]


def joined(parts: Sequence[Part]) -> Found:
    """Return texts, thoughts and calls, each put together."""
    found: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallBegin):
            assert part.id.startswith("call_")
            found.append([f"call {part.index}", part.name, ""])
        elif isinstance(part, CallArguments):
            assert found[-1][0] == f"call {part.index}"
            found[-1][2] += part.text
        else:
            kind = "text" if isinstance(part, Text) else "thought"
            assert isinstance(part, Text | Reasoning)
            assert part.text
            if not found or found[-1][0] != kind:
                found.append([kind, ""])
            found[-1][1] += part.text
    return [tuple(each) for each in found]


def check(make: Callable[[], Parser], text: str, expected: Found) -> None:
    """Read a text at once, character by character, and cut in two at each place."""

    def read(*pieces: str) -> Found:
        parser = make()
        parts = [part for piece in pieces for part in parser.push(piece)]
        return joined([*parts, *parser.finish()])

    assert read(text) == expected
    assert read(*text) == expected
    for place in range(len(text)):
        assert read(text[:place], text[place:]) == expected, text[:place]


CASES: dict[str, list[tuple[str, Found]]] = {
    "hermes": [
        ("hello world \n", [("text", "hello world \n")]),
        ("a <b> <tool", [("text", "a <b> <tool")]),
        (
            '<tool_call>\n{"name": "f", "arguments": {"a": "x}\\"{"}}\n</tool_call>',
            [("call 0", "f", '{"a": "x}\\"{"}')],
        ),
        (
            'See.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
            '<tool_call>{"arguments": {"b":[1,{"name":"q"}]}, "name": "g"}</tool_call>',
            [("text", "See."), ("call 0", "f", "{}"), ("call 1", "g", '{"b":[1,{"name":"q"}]}')],
        ),
        (
            '<tool_call>[{"name":"f","arguments":{"a":1}},{"name":"g","arguments":{}}]</tool_call>',
            [("call 0", "f", '{"a":1}'), ("call 1", "g", "{}")],
        ),
        ("<tool_call>[]</tool_call>", []),
        (
            'x <tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call> y',
            [("text", "x"), ("call 0", "f", '{"a": 1}'), ("text", " y")],
        ),
        ('<tool_call>{"name": "f"}</tool_call>', [("call 0", "f", "{}")]),
        ("a <tool_call>not json</tool_call> b", [("text", "a <tool_call>not json</tool_call> b")]),
        ('<tool_call>{"nam', [("text", '<tool_call>{"nam')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', [("call 0", "f", '{"a": 1')]),
        (
            "<tool_call>\n<function=f>\n<parameter=a>\n12\n</parameter>\n<parameter=b>\n[1]\n</parameter>\n"
            "</function>\n</tool_call>",
            [("call 0", "f", '{"a": "12", "b": [1]}')],
        ),
    ],
    "llama3_json": [
        ("hi {x}", [("text", "hi {x}")]),
        ('{"name": "f", "parameters": {"a": "b"}}', [("call 0", "f", '{"a": "b"}')]),
        (
            '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": 1}}',
            [("call 0", "f", "{}"), ("call 1", "g", '{"x": 1}')],
        ),
        ('  {"type": "function", "name": "f", "parameters": {"a": []}}', [("call 0", "f", '{"a": []}')]),
        ('{"answer": 42}', [("text", '{"answer": 42}')]),
        ('{"name": 3}', [("text", '{"name": 3}')]),
        ("{not json}", [("text", "{not json}")]),
        ("<|pyth", [("text", "<|pyth")]),
    ],
    "mistral": [
        ("hi [TOOL", [("text", "hi [TOOL")]),
        (
            '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
            [("call 0", "f", '{"a": 1}'), ("call 1", "g", "{}")],
        ),
        (
            'x [TOOL_CALLS]f[ARGS]{"a": {"b": 1}}[TOOL_CALLS]g{}',
            [("text", "x "), ("call 0", "f", '{"a": {"b": 1}}'), ("call 1", "g", "{}")],
        ),
        ('[TOOL_CALLS]f[CALL_ID]abc1[ARGS]{"x":1}', [("call 0", "f", '{"x":1}')]),
        ("[TOOL_CALLS]what is this?", [("text", "[TOOL_CALLS]what is this?")]),
    ],
    "pythonic": [
        ("hi", [("text", "hi")]),
        (
            "[f(a=1, b='x', c=[true, None], d={'k': 1.5}), mod.g()]",
            [
                ("call 0", "f", '{"a": 1, "b": "x", "c": [true, null], "d": {"k": 1.5}}'),
                ("call 1", "mod.g", "{}"),
            ],
        ),
        ('<|python_start|>[f(a="]")]<|python_end|>', [("call 0", "f", '{"a": "]"}')]),
        ("[1, 2]", [("text", "[1, 2]")]),
        ("[f(1)]", [("text", "[f(1)]")]),
        ("[f(a=open('x'))]", [("text", "[f(a=open('x'))]")]),
    ],
}


@pytest.mark.parametrize(
    ("name", "text", "expected"), [(name, *case) for name, cases in CASES.items() for case in cases]
)
def test_calls(name: str, text: str, expected: Found) -> None:
    check(lambda: FORMATS[name].parser(TOOLS), text, expected)


@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        ("<think>\nhm\nhm\n</think>\n\nYes", False, [("thought", "hm\nhm"), ("text", "Yes")]),
        ("hm</think>Yes", True, [("thought", "hm"), ("text", "Yes")]),
        ("\n\nhm </think>\n\nYes\n", True, [("thought", "hm "), ("text", "Yes\n")]),
        ("No thoughts", False, [("text", "No thoughts")]),
        ("<think>never", False, [("thought", "never")]),
        (" <think></think>x", False, [("text", "x")]),
        ("<thi", False, [("text", "<thi")]),
    ],
)
def test_reasoning(text: str, begun: bool, expected: Found) -> None:
    check(lambda: ReasoningParser(None, begun=begun), text, expected)


def test_calls_after_reasoning() -> None:
    text = 'I <tool_call> think</think>\n\n<tool_call>{"name":"f","arguments":{}}</tool_call>'
    expected = [("thought", "I <tool_call> think"), ("call 0", "f", "{}")]
    check(lambda: ReasoningParser(HermesParser(TOOLS), begun=True), text, expected)


@pytest.mark.parametrize(
    ("template", "calls"),
    [
        ("{% for t in tools %}{{ t }}{% endfor %}<tool_call>", "hermes"),
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ('{{ tools }}{"name": function name, "parameters": dictionary of argument name}', "llama3_json"),
        ("{{ tools }} [func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ tools }} unheard of", "hermes"),
    ],
)
def test_templates_tell_the_format(template: str, calls: str) -> None:
    assert format_of([template]) == ChatFormat(calls, describes_tools=True, shows_documents=False)


def test_templates_tell_of_reasoning_and_of_tools() -> None:
    assert format_of(["{{ messages }}"]) == ChatFormat("hermes", shows_documents=False)
    assert format_of(["{{ documents }}"]).shows_documents
    assert format_of(["{{ messages }}<think>"]).reasons


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_forced_and_guided_calls_are_grammars(name: str, several: bool) -> None:
    for make in (forced_calls, guided_calls):
        assert compile_grammar(make(name, TOOLS, several=several))
    assert forced_parser(name, TOOLS)
