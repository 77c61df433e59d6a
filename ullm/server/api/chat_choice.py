"""One choice of a chat's answer: its text read as reasoning, content and calls of tools."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from ullm.parsing.parts import CallBegin, Parser, Part, Reasoning, Text
from ullm.server.api.responses import ChatMessage, Delta, FunctionOutput, ToolCallOutput

if TYPE_CHECKING:
    from ullm.engine.output import Output


def call_id(call: CallBegin, ids: str) -> str:
    """Return the id of a call.

    Args:
        ids: what it derives from; empty: it is random.
    """
    if not ids:
        return call.id
    return f"call_{hashlib.sha256(f'{ids} {call.index}'.encode()).hexdigest()[:24]}"


class ChoiceParts:
    """Reads one choice.

    Args:
        parser: finds parts; None if all is text.
        legacy: whether a call is a ``function_call``.
        ids: what the ids of calls derive from; by default each one is random.
        reasoning: whether reasoning is shown.
    """

    def __init__(
        self, parser: Callable[[], Parser] | None, *, legacy: bool, ids: str = "", reasoning: bool = True
    ) -> None:
        self._reasoning = reasoning
        self._ids = ids
        self._parser = None if parser is None else parser()
        self._legacy = legacy
        self._message = ChatMessage(content="")
        self._calls: list[ToolCallOutput] = []

    def read(self, output: Output) -> list[Part]:
        """Return the parts of an output."""
        if self._parser is None:
            return [Text(output.text)] if output.text else []
        parts = list(self._parser.push(output.text))
        if output.finish_reason is not None:
            parts += self._parser.finish()
        return [part for part in parts if self._reasoning or not isinstance(part, Reasoning)]

    def finish_reason(self, output: Output) -> str | None:
        """Return why the choice ended; an answer that calls says so, unless it was cut."""
        if output.finish_reason == "stop" and self._calls and not self._is_cut(output):
            return "function_call" if self._legacy else "tool_calls"
        return output.finish_reason

    def _is_cut(self, output: Output) -> bool:
        """Return whether a stop string of the client's has ended the last call within its arguments."""
        if not isinstance(output.stop_reason, str):
            return False
        try:
            msgspec.json.decode(self._calls[-1].function.arguments or "")
        except (msgspec.DecodeError, RecursionError):
            return True
        return False

    def deltas(self, parts: Iterable[Part]) -> Iterator[Delta]:
        """Yield the delta of each part, and keep it for `message`."""
        for part in parts:
            self._keep(part)
            if isinstance(part, Text):
                yield Delta(content=part.text)
            elif isinstance(part, Reasoning):
                yield Delta(reasoning_content=part.text, reasoning=part.text)
            elif isinstance(part, CallBegin):
                function = FunctionOutput(name=part.name, arguments="")
                call = ToolCallOutput(
                    index=part.index, id=call_id(part, self._ids), type="function", function=function
                )
                yield Delta(function_call=function) if self._legacy else Delta(tool_calls=[call])
            else:
                function = FunctionOutput(arguments=part.text)
                call = ToolCallOutput(index=part.index, function=function)
                yield Delta(function_call=function) if self._legacy else Delta(tool_calls=[call])

    def add(self, parts: Iterable[Part]) -> None:
        """Keep parts for `message`."""
        for part in parts:
            self._keep(part)

    def _keep(self, part: Part) -> None:
        message = self._message
        if isinstance(part, Text):
            message.content = (message.content or "") + part.text
        elif isinstance(part, Reasoning):
            before = "" if message.reasoning is msgspec.UNSET else message.reasoning
            message.reasoning = message.reasoning_content = before + part.text
        elif isinstance(part, CallBegin):
            function = FunctionOutput(name=part.name, arguments="")
            self._calls.append(
                ToolCallOutput(id=call_id(part, self._ids), type="function", function=function)
            )
        else:
            function = self._calls[part.index].function
            function.arguments = f"{function.arguments}{part.text}"

    def message(self) -> ChatMessage:
        """Return the whole turn."""
        if self._calls:
            self._message.content = self._message.content or None
            if self._legacy:
                self._message.function_call = self._calls[0].function
            else:
                self._message.tool_calls = self._calls
        return self._message
