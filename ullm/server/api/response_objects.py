"""Responses as OpenAI shows them: the object, its items, and the events of its stream.

The events, their numbers included, are a function of the tokens so far. So a stream can be taken up at any
event, by any connection, and after a restart that computes the same tokens again, without a record of what
was sent: the events of the n-th token are numbered from `EVENTS_PER_TOKEN` times n on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from ullm.parsing.parts import CallArguments, CallBegin, Part, Reasoning, Text

EVENTS_PER_TOKEN = 16
"""Numbers that one token has; it cannot cause as many events. The first ones are for those before all."""

_Change = tuple[str, dict[str, Any]]
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(msgspec.Struct, kw_only=True):
    """The text of a message."""

    text: str
    type: Literal["output_text"] = "output_text"
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    """The assistant's turn."""

    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class FunctionCallItem(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A call of a function."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class ReasoningText(msgspec.Struct, kw_only=True):
    """What the model thought."""

    text: str
    type: Literal["reasoning_text"] = "reasoning_text"


class ReasoningItem(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought before it answered."""

    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[ReasoningText]
    summary: list[Any] = []


Item = OutputMessage | FunctionCallItem | ReasoningItem


class InputTokensDetails(msgspec.Struct):
    """Number of prompt tokens that the prefix cache had."""

    cached_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    """Number of tokens of reasoning."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, kw_only=True):
    """Tokens of one response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(msgspec.Struct):
    """Why a response has failed."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    """Why a response was cut."""

    reason: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/responses`` and of ``GET /v1/responses/{id}``.

    Args:
        incomplete_details: ``max_output_tokens``, or the cause in a word of ours.
    """

    id: str
    created_at: int
    status: Status
    model: str
    background: bool
    output: list[Item]
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: dict[str, Any] = msgspec.field(default_factory=lambda: {"effort": None, "summary": None})
    store: bool = True
    temperature: float = 1.0
    text: dict[str, Any] = msgspec.field(default_factory=lambda: {"format": {"type": "text"}})
    tool_choice: Any = "auto"
    tools: list[Any] = []
    top_logprobs: int = 0
    top_p: float = 1.0
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    object: Literal["response"] = "response"


class ResponseEvent(msgspec.Struct, kw_only=True):
    """An event of a stream; its other fields depend on its type."""

    type: str
    sequence_number: int


class DeletedResponse(msgspec.Struct, kw_only=True):
    """The answer of ``DELETE /v1/responses/{id}``."""

    id: str
    deleted: bool = True
    object: Literal["response"] = "response"


class InputItems(msgspec.Struct, kw_only=True):
    """The answer of ``GET /v1/responses/{id}/input_items``."""

    data: list[dict[str, Any]]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False
    object: Literal["list"] = "list"


_encode = msgspec.json.Encoder().encode


def event(kind: str, number: int, **fields: Any) -> bytes:
    """Return one event; its ``id`` is its number, for ``Last-Event-ID``."""
    body = _encode({"type": kind, "sequence_number": number, **fields})
    return b"event: " + kind.encode() + b"\nid: " + str(number).encode() + b"\ndata: " + body + b"\n\n"


class ItemEvents:
    """Puts the parts of an answer into items, and tells of each change.

    Args:
        response_id: ids of items are made from it.

    Attributes:
        output: the items so far.
    """

    def __init__(self, response_id: str) -> None:
        self.output: list[Item] = []
        self._hex = response_id.removeprefix("resp_")
        self._open = False

    def take(self, part: Part, logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[_Change]:
        """Add a part; yield the type and the fields of each event.

        Args:
            logprobs: of the tokens of a text.
        """
        if isinstance(part, CallArguments):
            yield from self._add_arguments(part.text)
        elif isinstance(part, CallBegin):
            yield from self.close("completed")
            number = sum(isinstance(item, FunctionCallItem) for item in self.output)
            call = FunctionCallItem(
                id=f"fc_{self._hex}_{number}",
                call_id=f"call_{self._hex}_{number}",
                name=part.name,
                arguments="",
                status="in_progress",
            )
            yield from self._begin(call)
        else:
            yield from self._add_text(part, logprobs)

    def close(self, status: Literal["completed", "incomplete"]) -> Iterator[_Change]:
        """End the last item, if it has not ended."""
        if not self._open:
            return
        self._open, item, index = False, self.output[-1], len(self.output) - 1
        item.status = status
        place = {"item_id": item.id, "output_index": index}
        if isinstance(item, FunctionCallItem):
            yield "response.function_call_arguments.done", {**place, "arguments": item.arguments}
        elif isinstance(item, OutputMessage):
            (text,) = item.content
            place["content_index"] = 0
            yield "response.output_text.done", {**place, "text": text.text, "logprobs": text.logprobs}
            yield "response.content_part.done", {**place, "part": text}
        else:
            (thought,) = item.content
            yield "response.reasoning_text.done", {**place, "content_index": 0, "text": thought.text}
        yield "response.output_item.done", {"output_index": index, "item": item}

    def _begin(self, item: Item) -> Iterator[_Change]:
        self.output.append(item)
        self._open = True
        yield "response.output_item.added", {"output_index": len(self.output) - 1, "item": item}

    def _add_arguments(self, text: str) -> Iterator[_Change]:
        item = self.output[-1]
        assert isinstance(item, FunctionCallItem), "a call begins before its arguments"
        place = {"item_id": item.id, "output_index": len(self.output) - 1}
        item.arguments += text
        yield "response.function_call_arguments.delta", {**place, "delta": text}

    def _add_text(self, part: Text | Reasoning, logprobs: Sequence[dict[str, Any]]) -> Iterator[_Change]:
        kind = OutputMessage if isinstance(part, Text) else ReasoningItem
        if not (self._open and isinstance(self.output[-1], kind)):
            yield from self.close("completed")
            yield from self._begin_text(part)
        item, index = self.output[-1], len(self.output) - 1
        assert not isinstance(item, FunctionCallItem), "it was closed"
        content = item.content[0]
        content.text += part.text
        if isinstance(content, OutputText):
            content.logprobs = [*content.logprobs, *logprobs] if logprobs else content.logprobs
        place = {"item_id": item.id, "output_index": index, "content_index": 0, "delta": part.text}
        if isinstance(part, Text):
            yield "response.output_text.delta", {**place, "logprobs": list(logprobs)}
        else:
            yield "response.reasoning_text.delta", place

    def _begin_text(self, part: Text | Reasoning) -> Iterator[_Change]:
        number = len(self.output)
        if isinstance(part, Reasoning):
            id = f"rs_{self._hex}_{number}"
            yield from self._begin(
                ReasoningItem(id=id, status="in_progress", content=[ReasoningText(text="")])
            )
            return
        id = f"msg_{self._hex}_{number}"
        yield from self._begin(OutputMessage(id=id, status="in_progress", content=[]))
        empty = OutputText(text="")
        self.output[-1].content.append(empty)  # type: ignore[union-attr,arg-type]
        yield (
            "response.content_part.added",
            {"item_id": id, "output_index": number, "content_index": 0, "part": empty},
        )
