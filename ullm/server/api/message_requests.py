"""Requests of Anthropic's Messages API: their schema, and their blocks as turns of a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import msgspec

from ullm.engine.sampling_defaults import SamplingDefaults
from ullm.errors import InvalidParameter
from ullm.grammars.structured_outputs import StructuredOutputs
from ullm.parsing.formats import ChatFormat
from ullm.parsing.tool_use import ToolUse, use_of
from ullm.sampling import SamplingParams
from ullm.server.api.schemas import Int


class ContentBlock(msgspec.Struct, kw_only=True):
    """A block of a turn, of the system prompt, or of a tool's result; the type says which fields it has.

    Args:
        signature: of thinking; nothing is signed here, so nothing is checked.
        cache_control: without effect, like ``citations``.
    """

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    tool_use_id: str | None = None
    content: str | list[ContentBlock] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    cache_control: Any = None
    citations: Any = None


class MessageTurn(msgspec.Struct, kw_only=True):
    """One turn of a conversation; those of the same role that follow each other are one."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class MessageTool(msgspec.Struct, kw_only=True):
    """A tool that the model may call.

    Args:
        type: ``custom``; tools that run at Anthropic are refused.
        strict: calls are always valid by the schema.
        input_examples: without effect, like ``cache_control``.
    """

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None
    input_examples: Any = None
    cache_control: Any = None


class MessageToolChoice(msgspec.Struct, kw_only=True):
    """Whether the answer calls a tool, and which one."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """Whether the model thinks before it answers, and with how many tokens at most.

    Args:
        display: ``summarized`` (all of it is shown), or ``omitted``: the block of it is empty.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Int | None = None
    display: Literal["summarized", "omitted"] | None = None


class MessageFormat(msgspec.Struct, kw_only=True):
    """The form of the answer: a JSON schema."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True):
    """The form of the answer, and how much the model is to think about it."""

    format: MessageFormat | None = None
    effort: str | None = None


class CountTokensRequest(msgspec.Struct, kw_only=True):
    """``POST /v1/messages/count_tokens``: the fields that make the prompt."""

    messages: list[MessageTurn]
    model: str | None = None
    system: str | list[ContentBlock] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: MessageFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """``POST /v1/messages``.

    Args:
        store: as in `ullm.server.api.schemas.ChatCompletionRequest`.
    """

    max_tokens: Int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    seed: Int | None = None
    stream: bool | None = None
    store: bool | None = None


def sampling_params(
    request: MessagesRequest, defaults: SamplingDefaults, timeout: float | None, *, reasons: bool
) -> SamplingParams:
    """Return the sampling parameters.

    Args:
        defaults: the model's, for what the request leaves out.
        timeout: in seconds, from the request's header.
        reasons: whether the model does; otherwise a budget for it has no effect.

    Raises:
        InvalidParameter: a value is out of range; names the field.
    """
    budget = request.thinking.budget_tokens if request.thinking is not None and reasons else None
    values: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "max_tokens": request.max_tokens,
        "stop": request.stop_sequences,
        "seed": request.seed,
        "timeout": timeout,
        "structured_outputs": _form(request),
        "thinking_token_budget": budget,
    }
    try:
        return defaults.params(**{name: value for name, value in values.items() if value is not None})
    except InvalidParameter as error:
        raise renamed(error) from None


def renamed(error: InvalidParameter) -> InvalidParameter:
    """Return an error that names the field as this API does."""
    error.rename_field("stop", "stop_sequences")
    error.rename_field("thinking_token_budget", "thinking.budget_tokens")
    return error


def read_format(request: MessagesRequest, chat: ChatFormat) -> ChatFormat:
    """Return how the answer is read; where it has begun already, its reasoning is over."""
    return replace(chat, reasons=False) if goes_on(request) else chat


def shows_thinking(request: MessagesRequest) -> bool:
    """Return whether the answer shows what the model thinks, not only that it does."""
    return request.thinking is None or request.thinking.display != "omitted"


def _form(request: CountTokensRequest) -> StructuredOutputs | None:
    config = request.output_config or OutputConfig()
    if config.format is not None and request.output_format is not None:
        raise InvalidParameter("output_format is the older name of output_config.format", "output_format")
    name = "output_config.format" if config.format is not None else "output_format"
    form = config.format or request.output_format
    return None if form is None else StructuredOutputs(json=form.schema, source=f"{name}.schema")


def template_kwargs(request: CountTokensRequest) -> dict[str, Any]:
    """Return the arguments of the chat template that the request has fields for."""
    kwargs: dict[str, Any] = {}
    if request.thinking is not None:
        kwargs["enable_thinking"] = request.thinking.type != "disabled"
    if request.output_config is not None and request.output_config.effort is not None:
        kwargs["reasoning_effort"] = request.output_config.effort
    return {**kwargs, **(request.chat_template_kwargs or {})}


def tool_use(request: CountTokensRequest) -> ToolUse:
    """Return what the request says of tools.

    Raises:
        InvalidParameter: a tool runs at Anthropic, or the choice does not go with the tools.
    """
    tools = [_function(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())]
    asked = request.tool_choice or MessageToolChoice(type="auto")
    if asked.type == "tool" and asked.name is None:
        raise InvalidParameter("tool_choice.name is missing", "tool_choice.name")
    choice: str | dict[str, Any] = {"any": "required"}.get(asked.type, asked.type)
    if asked.type == "tool":
        choice = {"type": "function", "function": {"name": asked.name}}
    return use_of(tools, choice, parallel=not asked.disable_parallel_tool_use)


def _function(tool: MessageTool, place: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise InvalidParameter(
            f"{place}.type: {tool.type!r} is not supported; only tools of the client's own are, with an "
            "input_schema",
            f"{place}.type",
        )
    if tool.input_schema is None:
        raise InvalidParameter(f"{place}.input_schema is missing", f"{place}.input_schema")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


# --- turns -----------------------------------------------------------------------------------------


def goes_on(request: CountTokensRequest) -> bool:
    """Whether the answer goes on in the last message, which is the assistant's and has a text."""
    last = request.messages[-1] if request.messages else None
    if last is None or last.role != "assistant":
        return False
    return bool(_joined(_blocks(last.content), "messages[-1]"))


def template_turns(request: CountTokensRequest) -> list[dict[str, Any]]:
    """Return the conversation as chat templates take it.

    A tool's result is a turn of its own; one that is an error says so, since templates have no place for
    that. Text blocks of a turn are joined by newlines, those of the assistant as they are.

    Raises:
        InvalidParameter: there are no messages, or a block is of a kind that is not supported.
    """
    if not request.messages:
        raise InvalidParameter("messages is empty; it must have at least one message", "messages")
    turns = _Turns()
    if request.system:
        turns.add("system", _joined(_blocks(request.system), "system", "\n"))
    for index, message in enumerate(request.messages):
        place = f"messages[{index}]"
        if message.role == "system":
            turns.add("system", _joined(_blocks(message.content), place, "\n"))
        elif message.role == "user":
            turns.add_user(_blocks(message.content), place)
        else:
            turns.add_assistant(_blocks(message.content), place)
    return turns.ended(f"messages[{len(request.messages) - 1}]")


class _Turns:
    """Turns as they come; those of the same role that follow each other become one."""

    def __init__(self) -> None:
        self._turns: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}

    def add(self, role: str, text: str, separator: str = "\n") -> dict[str, Any]:
        """Add a text to the last turn, if that has the role, or as a new one."""
        last = self._turns[-1] if self._turns else {}
        if last.get("role") != role:
            last = {"role": role, "content": ""}
            self._turns.append(last)
        last["content"] = separator.join(filter(None, (last["content"], text)))
        return last

    def add_user(self, blocks: list[ContentBlock], place: str) -> None:
        """Add the results of tools, and the user's text."""
        for index, block in enumerate(blocks):
            where = f"{place}.content[{index}]"
            if block.type == "tool_result":
                self._add_result(block, where)
            else:
                self.add("user", _text(block, where))
        if not blocks:
            self.add("user", "")

    def _add_result(self, block: ContentBlock, where: str) -> None:
        if block.tool_use_id is None:
            raise InvalidParameter(f"{where}.tool_use_id is missing", f"{where}.tool_use_id")
        text = _joined(_blocks(block.content or ""), where, "\n")
        turn = {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": f"Error: {text}" if block.is_error else text,
        }
        if block.tool_use_id in self._names:
            turn["name"] = self._names[block.tool_use_id]
        self._turns.append(turn)

    def add_assistant(self, blocks: list[ContentBlock], place: str) -> None:
        """Add what the assistant has thought, said and called."""
        turn = self.add("assistant", "", "")
        for index, block in enumerate(blocks):
            where = f"{place}.content[{index}]"
            if block.type == "tool_use":
                turn.setdefault("tool_calls", []).append(self._call(block, where))
            elif block.type == "thinking":
                turn["reasoning_content"] = turn.get("reasoning_content", "") + (block.thinking or "")
            elif block.type != "redacted_thinking":  # which only its maker can read
                turn["content"] += _text(block, where)

    def _call(self, block: ContentBlock, where: str) -> dict[str, Any]:
        if block.id is None or block.name is None:
            missing = "id" if block.id is None else "name"
            raise InvalidParameter(f"{where}.{missing} is missing", f"{where}.{missing}")
        self._names[block.id] = block.name
        arguments = {} if block.input is None else block.input
        return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}

    def ended(self, place: str) -> list[dict[str, Any]]:
        """Return all turns, whose last one can be answered, or go on.

        Args:
            place: of the last message.
        """
        last = self._turns[-1]
        if last["role"] == "assistant":
            if last.get("tool_calls"):
                raise InvalidParameter(f"{place}: a tool_use block needs a tool_result after it", place)
            if not last["content"]:
                if last.get("reasoning_content"):
                    raise InvalidParameter(f"{place}: the last message cannot end with thinking", place)
                self._turns.pop()  # an answer that begins with nothing
        if not self._turns or self._turns[-1]["role"] == "system":
            raise InvalidParameter(f"{place}: there is nothing to answer", place)
        return self._turns


def _blocks(content: str | list[ContentBlock]) -> list[ContentBlock]:
    if isinstance(content, str):
        return [ContentBlock(type="text", text=content)] if content else []
    return content


def _joined(blocks: list[ContentBlock], place: str, separator: str = "") -> str:
    return separator.join(_texts(blocks, place))


def _texts(blocks: list[ContentBlock], place: str) -> Iterator[str]:
    inner = place if place == "system" else f"{place}.content"
    for index, block in enumerate(blocks):
        if block.type not in ("thinking", "redacted_thinking", "tool_use") or place == "system":
            yield _text(block, f"{inner}[{index}]")


def _text(block: ContentBlock, where: str) -> str:
    if block.type != "text":
        raise InvalidParameter(f"{where}: blocks of type {block.type!r} are not supported here", where)
    if block.text is None:
        raise InvalidParameter(f"{where}.text is missing", f"{where}.text")
    return block.text
