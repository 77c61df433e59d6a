"""What parsers find in whatever a model may write is the same however the text is cut, and can be sent."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parsing.test_parsers import Found, joined
from ullm.parsing.formats import FORMATS, forced_parser
from ullm.parsing.hermes import HermesParser
from ullm.parsing.mistral import MistralParser
from ullm.parsing.parts import Parser
from ullm.parsing.reasoning import ReasoningParser

TOOLS: dict[str, dict[str, Any]] = {"f": {"properties": {"a": {"type": "string"}}}, "g": {"properties": []}}
MARKERS = {
    "hermes": ["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>", "</parameter>"],
    "llama3_json": ["<|python_tag|>", ";"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "abc1"],
    "pythonic": ["[f(", "a=", ")]", "<|python_start|>", "<|python_end|>", "'x'", "1j", "1e999", "'\\ud800'"],
}
PIECES = [
    '{"name": "f", "arguments": {"a": "x"}}',
    '{"name":"g","parameters":{"a":1}}',
    '{"name": "f", "arguments": {',
    *('"name"', '"function"', '"arguments"', '"parameters"', '"type"', '"x"', '"f"', '"\\ud800"', '"a\n"'),
    *('{"', '":', "{", "}", "[", "]", "{}", '"', ":", ",", "\\", "\n", " ", "<", "</"),
    *("hi", "é😀", "null", "NaN", "1e", "<think>", "</think>"),
]
MAKERS: dict[str, Callable[[], Parser]] = {
    **{name: lambda make=each.parser: make(TOOLS) for name, each in FORMATS.items()},
    **{f"{name} forced": lambda name=name: forced_parser(name, TOOLS) for name in FORMATS},
    **{
        f"{name} after reasoning": lambda make=each.parser: ReasoningParser(make(TOOLS), begun=False)
        for name, each in FORMATS.items()
    },
}


def read(make: Callable[[], Parser], *pieces: str) -> Found:
    parser = make()
    parts = [part for piece in pieces for part in parser.push(piece)]
    parts += parser.finish()
    assert msgspec.json.encode(parts), "can be sent"
    return joined(parts)


@pytest.mark.parametrize("name", sorted(MAKERS))
@settings(max_examples=60, derandomize=True)
@given(data=st.data())
def test_cuts_change_nothing(name: str, data: st.DataObject) -> None:
    piece = st.sampled_from(MARKERS[name.split()[0]]) | st.sampled_from(PIECES)
    text = "".join(data.draw(st.lists(piece, max_size=9)))
    check(MAKERS[name], text)


def check(make: Callable[[], Parser], text: str) -> None:
    whole = read(make, text)
    assert read(make, *text) == whole
    for place in range(len(text)):
        assert read(make, text[:place], text[place:]) == whole, text[:place]


CALL = '{"name":"f","parameters":{}}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3_json", f"{CALL} and then {CALL}"),
        ("llama3_json", '{"x": 1, "name": "f"}'),
        ("llama3_json", '{"function": "g", "name": "f"}'),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1}, "parameters": {}}'),
        ("hermes", f"<tool_call>{CALL} oh <tool_call>{CALL}"),
        ("hermes", f"<tool_call><{CALL}</tool_call>"),
        ("mistral", "[TOOL_CALLS]?[TOOL_CALLS]f{}"),
        ("mistral", "[TOOL_CALLS][1, 2]"),
    ],
)
def test_cuts_that_changed_something(name: str, text: str) -> None:
    check(MAKERS[name], text)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("llama3_json", '{"name": "f", "parameters": null}', [("call 0", "f", "{}")]),
        ("llama3_json", '{"name": "f", "parameters": "a"b}', [("call 0", "f", '"a"b')]),
        ("llama3_json", '{"name": "f", "para', [("call 0", "f", "")]),  # nothing is made up
        ("llama3_json", '{"name": "\\ud800"}', [("text", '{"name": "\\ud800"}')]),
        ("pythonic", "[f(a={1})]", [("text", "[f(a={1})]")]),
        ("pythonic", "[f(a=1j)]", [("text", "[f(a=1j)]")]),
        ("pythonic", "[f(a=1e999)]", [("text", "[f(a=1e999)]")]),
        ("pythonic", r"[f(a='\ud800')]", [("call 0", "f", r'{"a": "\ud800"}')]),
        ("mistral", "[TOOL_CALLS][1, 2]", [("text", "[TOOL_CALLS][1, 2]")]),
        ("mistral", "[TOOL_CALLS]?[TOOL_CALLS]f{}", [("text", "[TOOL_CALLS]?"), ("call 0", "f", "{}")]),
    ],
)
def test_what_is_no_json(name: str, text: str, found: Found) -> None:
    assert read(MAKERS[name], text) == found


@pytest.mark.parametrize("value", ["[" * 100_000, "NaN", '"\\ud800"'], ids=["deep", "no number", "half"])
def test_values_of_xml_that_json_does_not_have(value: str) -> None:
    text = f"<tool_call><function=g><parameter=a>{value}</parameter></function></tool_call>"
    (call,) = read(lambda: HermesParser(TOOLS), text)
    arguments = msgspec.json.decode(call[2]) if "ud800" not in value else {"a": value}
    assert arguments == {"a": value}


def test_no_text_takes_long_to_read() -> None:
    begun = time.process_time()
    MistralParser().push("[TOOL_CALLS]f" + "[AAAAAA" * 30 + "!")
    MistralParser().push("[TOOL_CALLS]f" + " " * 20_000 + "!")
    assert time.process_time() - begun < 1
