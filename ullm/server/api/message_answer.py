"""Answers in the format of Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from ullm.parsing.parts import CallArguments, CallBegin, Part, Reasoning, Text
from ullm.parsing.tool_use import PLAIN, Reading
from ullm.server.api.answers import AnswerHead
from ullm.server.api.chat_choice import call_id
from ullm.server.api.errors import as_request_error
from ullm.server.api.message_errors import message_error_body
from ullm.server.api.message_objects import (
    Block,
    MessageObject,
    MessageUsage,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
    event,
)

if TYPE_CHECKING:
    from ullm.engine.output import Output
    from ullm.server.api.responses import Usage

INVALID = "INVALID_JSON"
"""Key of arguments that are no JSON object, as Anthropic's documentation names it."""


class MessageAnswer:
    """The answer to one conversation; see `ullm.server.api.answers.AnswerFormat`.

    Args:
        prompt_tokens: length of the prompt.
        max_tokens: the client's limit; the context may end the text before.
        reading: how the text is read.
        show_thinking: show what the model thinks, not only that it does.
        call_ids: what the ids of calls derive from; by default each one is random.
    """

    def __init__(
        self,
        head: AnswerHead,
        *,
        prompt_tokens: int,
        max_tokens: int,
        reading: Reading = PLAIN,
        show_thinking: bool = True,
        call_ids: str = "",
    ) -> None:
        self._call_ids = call_ids
        self._show_thinking = show_thinking
        self._prompt_tokens = prompt_tokens
        self._max_tokens = max_tokens
        self._parser = None if reading.parser is None else reading.parser()
        self._blocks: list[Block] = []
        self._arguments: dict[int, str] = {}
        self._begun = self._open = False
        usage = MessageUsage(input_tokens=prompt_tokens, output_tokens=0)
        self._message = MessageObject(id=head.id, model=head.model, content=[], usage=usage)

    async def prepare(self, prompt: int, output: Output) -> None:
        """Nothing takes long."""

    def events(self, prompt: int, output: Output) -> bytes:
        """Return the events of an output; the first one begins the message."""
        events = list(self._take(output))
        if not self._begun:
            self._begun = True
            shown = msgspec.structs.replace(self._message, content=[], stop_reason=None, stop_sequence=None)
            shown.stop_cause = msgspec.UNSET
            events.insert(0, event("message_start", message=shown))
        return b"".join(events)

    def end(self, usage: Usage) -> bytes:
        """Return the last events of the stream."""
        message = self._message
        self._count(usage.completion_tokens)
        delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        if message.stop_cause is not msgspec.UNSET:
            delta["stop_cause"] = message.stop_cause
        return event("message_delta", delta=delta, usage=message.usage) + event("message_stop")

    def add(self, prompt: int, output: Output) -> None:
        """Add an output to the whole answer."""
        for _ in self._take(output):
            pass

    def whole(self, usage: Usage) -> MessageObject:
        """Return the whole answer."""
        self._count(usage.completion_tokens)
        self._message.content = self._blocks
        for index, text in self._arguments.items():
            block = self._blocks[index]
            assert isinstance(block, ToolUseBlock), "arguments belong to calls"
            block.input = _arguments(text)
        return self._message

    def _count(self, output_tokens: int) -> None:
        self._message.usage.output_tokens = output_tokens

    def _take(self, output: Output) -> Iterator[bytes]:
        """Add an output; yield an event per change."""
        usage, cached = self._message.usage, output.num_cached_tokens
        if not self._begun:
            usage.input_tokens, usage.cache_read_input_tokens = self._prompt_tokens - cached, cached
        self._count(output.num_generated_tokens)
        for part in self._parts(output):
            yield from self._add(part)
        if output.finish_reason is not None:
            yield from self._close()
            self._end(output)

    def _parts(self, output: Output) -> list[Part]:
        if self._parser is None:
            return [Text(output.text)] if output.text else []
        parts = list(self._parser.push(output.text))
        return parts if output.finish_reason is None else [*parts, *self._parser.finish()]

    def _add(self, part: Part) -> Iterator[bytes]:
        if isinstance(part, CallBegin):
            id = f"toolu_{call_id(part, self._call_ids).removeprefix('call_')}"
            yield from self._begin(ToolUseBlock(id=id, name=part.name))
            self._arguments[len(self._blocks) - 1] = ""
        elif isinstance(part, CallArguments):
            self._arguments[len(self._blocks) - 1] += part.text
            if part.text:
                yield self._delta("input_json_delta", partial_json=part.text)
        elif isinstance(part, Reasoning):
            block = self._blocks[-1] if self._open else None
            if not isinstance(block, ThinkingBlock):
                block = ThinkingBlock()
                yield from self._begin(block)
            if self._show_thinking:
                block.thinking += part.text
                yield self._delta("thinking_delta", thinking=part.text)
        else:
            block = self._blocks[-1] if self._open else None
            if not isinstance(block, TextBlock):
                block = TextBlock()
                yield from self._begin(block)
            block.text += part.text
            yield self._delta("text_delta", text=part.text)

    def _begin(self, block: Block) -> Iterator[bytes]:
        yield from self._close()
        self._blocks.append(block)
        self._open = True
        yield event("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _delta(self, kind: str, **fields: str) -> bytes:
        return event("content_block_delta", index=len(self._blocks) - 1, delta={"type": kind, **fields})

    def _close(self) -> Iterator[bytes]:
        if self._open:
            self._open = False
            yield event("content_block_stop", index=len(self._blocks) - 1)

    def _end(self, output: Output) -> None:
        message, reason = self._message, output.finish_reason
        if reason == "length":
            cut = output.num_generated_tokens >= self._max_tokens
            message.stop_reason = "max_tokens" if cut else "model_context_window_exceeded"
        elif reason != "stop":
            message.stop_reason, message.stop_cause = "pause_turn", reason or ""
        elif isinstance(output.stop_reason, str):
            message.stop_reason, message.stop_sequence = "stop_sequence", output.stop_reason
        else:
            message.stop_reason = "tool_use" if self._arguments else "end_turn"


def _arguments(text: str) -> dict[str, object]:
    try:
        found = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {INVALID: text}


def message_error_event(error: BaseException) -> bytes:
    """Return the event that ends a stream with an error."""
    return b"event: error\ndata: " + message_error_body(as_request_error(error)) + b"\n\n"
