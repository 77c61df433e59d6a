"""The formats in which models write calls, chosen by the chat template, and grammars that force a call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ullm.grammars.structured_outputs import StructuredOutputs
from ullm.parsing.hermes import HermesParser
from ullm.parsing.json_calls import JsonCallsParser
from ullm.parsing.mistral import MistralParser
from ullm.parsing.parts import Parser
from ullm.parsing.pythonic import PythonicParser
from ullm.parsing.reasoning import OPEN as THINK

Schemas = Mapping[str, Mapping[str, Any]]
"""Tool → JSON schema of its arguments."""


@dataclass(frozen=True)
class CallFormat:
    """How a model writes calls.

    Args:
        parser: makes what finds them, given the tools.
        special: whether markers are special tokens, which are not shown otherwise.
        markers: texts in a chat template that tell the format.
        arguments: the name that the format gives the arguments.
        tagged: whether a call stands between tags, so that text may surround it.
    """

    parser: Callable[[Schemas], Parser]
    special: bool = False
    markers: tuple[str, ...] = ()
    arguments: str = "arguments"
    tagged: bool = False


FORMATS: Mapping[str, CallFormat] = {
    "mistral": CallFormat(lambda tools: MistralParser(), special=True, markers=("[TOOL_CALLS]",)),
    "hermes": CallFormat(HermesParser, markers=("<tool_call>",), tagged=True),
    "llama3_json": CallFormat(
        lambda tools: JsonCallsParser(("<|python_tag|>",)),
        special=True,
        markers=("<|python_tag|>", '"parameters":', "'parameters':", "dictionary of argument name"),
        arguments="parameters",
    ),
    "pythonic": CallFormat(
        lambda tools: PythonicParser(), special=True, markers=("<|python_start|>", "func_name1(params")
    ),
}
"""Name → format; the first one that a template shows a marker of is its."""

_SPACING = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
"""JSON as models write it, on one line."""

DEFAULT_FORMAT = "hermes"
"""For templates that show none: the tools are described, and the format with them."""


@dataclass(frozen=True)
class ChatFormat:
    """What a model's chat template says of the answers that it leads to.

    Args:
        calls: name of the format of calls.
        describes_tools: whether the template tells the model of tools.
        reads_calls: whether it writes earlier calls into the prompt.
        reasons: whether answers may begin with reasoning between tags.
        shows_documents: whether the template writes documents into the prompt.
    """

    calls: str = DEFAULT_FORMAT
    describes_tools: bool = False
    reads_calls: bool = False
    reasons: bool = False
    shows_documents: bool = True


def format_of(templates: Sequence[str]) -> ChatFormat:
    """Return the format of the answers, by the text of a model's chat templates."""
    text = "\n".join(templates)
    describes = "tools" in text
    shown = (
        name for name, each in FORMATS.items() if describes and any(marker in text for marker in each.markers)
    )
    reasons = THINK in text or "</think>" in text
    return ChatFormat(
        next(shown, DEFAULT_FORMAT), describes, "tool_calls" in text, reasons, "documents" in text
    )


def forced_calls(name: str, tools: Schemas, *, several: bool) -> StructuredOutputs:
    """Return the form of an answer that is a call of one of the tools, or several.

    Markers that are special tokens are left out; `forced_parser` reads it.
    """
    call = _json_call(tools, FORMATS[name].arguments)
    opened, closed = ('"<tool_call>\\n"', '"\\n</tool_call>"') if FORMATS[name].tagged else ("", "")
    more = f' ("\\n" {opened} call {closed}){{0,7}}' if several and opened else ""
    more = more or (' (";" call){0,7}' if several else "")
    return _form(f"start: {opened} call {closed}{more}\n{call}", tools)


def guided_calls(name: str, tools: Schemas, *, several: bool) -> StructuredOutputs:
    """Return the form of an answer that is text or calls, where calls are valid."""
    call = _json_call(tools, FORMATS[name].arguments)
    if FORMATS[name].tagged:
        times = "*" if several else "?"
        rules = f"""start: tag{times} rest
rest: TEXT
tag: open call "\\n</tool_call>"
open[lazy]: TEXT "<tool_call>\\n"
TEXT: /(.|\\n)*/
"""
    else:
        more = ' (";" call){0,7}' if several else ""
        rules = f"start: call{more} | TEXT\nTEXT: /[^{{\\[](.|\\n)*/\n"
    return _form(rules + call, tools)


def _form(rules: str, tools: Schemas) -> StructuredOutputs:
    schemas = {f"tools.{name}.parameters": schema for name, schema in tools.items()}
    return StructuredOutputs(grammar=f"%llguidance {{}}\n{rules}", source="tools", schemas=schemas)


def forced_parser(name: str, tools: Schemas) -> Parser:
    """Return what reads an answer of `forced_calls` or `guided_calls`."""
    return FORMATS[name].parser(tools) if FORMATS[name].tagged else JsonCallsParser()


def _json_call(tools: Schemas, arguments: str) -> str:
    """Return the rule of a call: an object with a tool's name and arguments that are valid for it."""
    calls = []
    for name, schema in tools.items():
        head = json.dumps(f'{{"name": {json.dumps(name)}, "{arguments}": ', ensure_ascii=False)
        body = {**schema, "x-guidance": _SPACING}
        calls.append(f'{head} %json {json.dumps(body)} "}}"')
    return "call: " + " | ".join(calls) + "\n"
