"""Tools and documents for chat templates without a place for them: described in the system message."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ullm.parsing.formats import ChatFormat

_INSTRUCTIONS = """You can call functions. They are here, one per line, with a JSON schema of the arguments:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and its arguments between tags, and nothing else:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
Answer without a call if no function helps."""

_DOCUMENTS = """Here are documents, one per line, to answer from:
<documents>
{documents}
</documents>"""


def fit_to_template(
    chat: ChatFormat, turns: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return turns and tools as the chat template takes them: what it has no place for becomes text."""
    fitted = list(turns) if chat.reads_calls else [plain_turn(turn) for turn in turns]
    if tools and not chat.describes_tools:
        return with_described_tools(fitted, tools), None
    return fitted, tools or None


def with_described_tools(
    messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a conversation whose system message describes the tools."""
    return _told(messages, _INSTRUCTIONS.format(tools=_lines(tool.get("function", tool) for tool in tools)))


def with_documents(
    messages: Sequence[dict[str, Any]], documents: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a conversation whose system message has the documents."""
    return _told(messages, _DOCUMENTS.format(documents=_lines(documents)))


def _lines(values: Iterable[Any]) -> str:
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in values)


def _told(messages: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return a conversation whose system message ends with a text."""
    if messages and messages[0].get("role") == "system" and isinstance(messages[0].get("content"), str):
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def plain_turn(message: dict[str, Any]) -> dict[str, Any]:
    """Return a turn whose calls, or whose result of a call, are part of its text."""
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content')}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [str(message.get("content") or ""), *map(_call_text, calls)]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, texts))}


def _call_text(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        written = arguments  # as the model wrote it, JSON or not
    else:
        written = json.dumps(arguments or {}, ensure_ascii=False)
    return (
        f'<tool_call>\n{{"name": {json.dumps(function.get("name"))}, "arguments": {written}}}\n</tool_call>'
    )
