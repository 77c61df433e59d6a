"""Answers of Anthropic's Messages API: the message, its blocks, and the events of its stream."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class TextBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="text"):
    """A piece of the answer's text."""

    text: str = ""
    citations: None = None


class ThinkingBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="thinking"):
    """What the model thought; the signature is empty, since nothing is signed."""

    thinking: str = ""
    signature: str = ""


class ToolUseBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="tool_use"):
    """A call of a tool.

    Args:
        input: the arguments; ``{"INVALID_JSON": text}`` where the model's text is no JSON object.
    """

    id: str
    name: str
    input: dict[str, Any] = {}


Block = TextBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(msgspec.Struct, kw_only=True):
    """Tokens of one message.

    Args:
        input_tokens: of the prompt, those that the prefix cache did not have.
        cache_read_input_tokens: those that it had; both together are the prompt.
        cache_creation_input_tokens: 0: keeping a prefix costs nothing.
    """

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class MessageObject(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/messages``.

    Args:
        stop_reason: ``end_turn``, ``max_tokens``, ``stop_sequence``, ``tool_use``,
            ``model_context_window_exceeded``, or ``pause_turn``: cut short, and goes on if it is sent back.
        stop_sequence: the one that ended it.
        stop_cause: why it was cut short: ``timeout`` or ``abort``.
    """

    id: str
    model: str
    content: list[Block]
    usage: MessageUsage
    stop_reason: str | None = None
    stop_sequence: str | None = None
    stop_cause: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class MessageEvent(msgspec.Struct, kw_only=True):
    """An event of a stream; its other fields depend on its type."""

    type: str


class DeletedMessage(msgspec.Struct, kw_only=True):
    """The answer of ``DELETE /v1/messages/{id}``."""

    id: str
    type: Literal["message_deleted"] = "message_deleted"


class TokenCount(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/messages/count_tokens``."""

    input_tokens: int


class MessageErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong, in Anthropic's words."""

    type: str
    message: str


class MessageError(msgspec.Struct, kw_only=True):
    """The answer of the Messages API to a request that cannot be served."""

    error: MessageErrorDetail
    request_id: str | None = None
    type: Literal["error"] = "error"


_encode = msgspec.json.Encoder().encode


def event(kind: str, **fields: Any) -> bytes:
    """Return one event of a stream."""
    return b"event: " + kind.encode() + b"\ndata: " + _encode({"type": kind, **fields}) + b"\n\n"


PING = event("ping")
