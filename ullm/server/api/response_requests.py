"""Requests of the Responses API: their schema, and their items as turns of a conversation."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from ullm.engine.sampling_defaults import SamplingDefaults
from ullm.errors import InvalidParameter
from ullm.grammars.structured_outputs import StructuredOutputs
from ullm.sampling import SamplingParams
from ullm.server.api import schemas
from ullm.server.api.schemas import Int

LOGPROBS = "message.output_text.logprobs"
_INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
_THOUGHTS = ("reasoning_text", "summary_text", "text")


class TextFormat(msgspec.Struct, kw_only=True):
    """The form of the answer: ``text``, ``json_object``, or ``json_schema`` with its schema."""

    type: str = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, kw_only=True):
    """Options of the text of the answer."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(msgspec.Struct, kw_only=True):
    """How much the model is to think before it answers.

    Args:
        effort: for the chat template.
        max_tokens: see ``thinking_token_budget`` of chats.
        summary: without effect, like its older name: reasoning is shown as it is.
    """

    effort: str | None = None
    max_tokens: Int | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """``POST /v1/responses``.

    Args:
        input: the user's text, or items: messages, function calls and their outputs.
        instructions: a system message before everything; not taken over from the previous response.
        previous_response_id: a stored response, whose conversation goes on.
        store: keep the response; default: true.
        background: answer at once, and go on without the client.
        include: what else is shown: `LOGPROBS`, and what this server shows, or does not have, anyway.
        top_logprobs: candidates per token of the text.
    """

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    seed: Int | None = None
    text: TextConfig | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning: ReasoningConfig | None = None
    thinking_token_budget: Int | None = None
    include: list[str] | None = None
    top_logprobs: Int | None = None


def template_kwargs(request: ResponsesRequest) -> dict[str, Any]:
    """Return the arguments of the chat template that the request has fields for."""
    effort = None if request.reasoning is None else request.reasoning.effort
    kwargs = {} if effort is None else {"reasoning_effort": effort}
    return {**kwargs, **(request.chat_template_kwargs or {})}


def _budget(request: ResponsesRequest) -> tuple[str, int | None]:
    """Return the name by which the client has sent the budget of reasoning, and the budget."""
    named = None if request.reasoning is None else request.reasoning.max_tokens
    if named is None:
        return "thinking_token_budget", request.thinking_token_budget
    if request.thinking_token_budget not in (None, named):
        raise InvalidParameter(
            "reasoning.max_tokens and thinking_token_budget are two names of one value",
            "thinking_token_budget",
        )
    return "reasoning.max_tokens", named


def renamed(error: InvalidParameter, request: ResponsesRequest) -> InvalidParameter:
    """Return an error that names the field as this API does."""
    error.rename_field("max_tokens", "max_output_tokens")
    error.rename_field("logprobs", "top_logprobs")
    error.rename_field("thinking_token_budget", _budget(request)[0])
    return error


def sampling_params(request: ResponsesRequest, defaults: SamplingDefaults, seed: int) -> SamplingParams:
    """Return the sampling parameters.

    Args:
        defaults: the model's, for what the request leaves out.
        seed: for a request that names none; an answer that goes on after a restart needs one.

    Raises:
        InvalidParameter: a value is out of range; names the field.
    """
    values: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "max_tokens": request.max_output_tokens,
        "seed": seed if request.seed in (None, -1) else request.seed,
        "structured_outputs": _form(request.text),
        "thinking_token_budget": _budget(request)[1],
        "logprobs": _logprobs(request),
    }
    try:
        return defaults.params(**{name: value for name, value in values.items() if value is not None})
    except InvalidParameter as error:
        raise renamed(error, request) from None


def _logprobs(request: ResponsesRequest) -> int | None:
    include = request.include or []
    for index, each in enumerate(include):
        if each not in _INCLUDED:
            raise InvalidParameter(f"include[{index}]: {each!r} is not known here; leave it out", "include")
    return request.top_logprobs or (0 if LOGPROBS in include else None)


def _form(text: TextConfig | None) -> StructuredOutputs | None:
    form = None if text is None else text.format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return StructuredOutputs(json_object=True, source="text.format")
    if form.type == "json_schema" and form.schema is not None:
        return StructuredOutputs(json=form.schema, source="text.format.schema")
    raise InvalidParameter(
        "text.format must be of type text, json_object, or json_schema with a schema", "text.format"
    )


def input_messages(request: ResponsesRequest) -> list[schemas.Message]:
    """Return the input as turns of a conversation.

    Raises:
        InvalidParameter: an item is of a kind that is not supported; names its place.
    """
    if isinstance(request.input, str):
        return [schemas.Message(role="user", content=request.input)]
    if not request.input and request.previous_response_id is None:
        raise InvalidParameter("input is empty; it must have at least one item", "input")
    messages: list[schemas.Message] = []
    for index, item in enumerate(request.input):
        message = _message(item, f"input[{index}]")
        if item.get("type") == "reasoning" and message.reasoning_content is None:
            continue  # it is encrypted, or hidden
        before = messages[-1] if messages else None
        if before is None or not _is_one_turn(before, message):
            messages.append(message)
            continue
        if message.tool_calls:
            before.tool_calls = [*(before.tool_calls or ()), *message.tool_calls]
        if message.content:
            before.content = message.content
        if message.reasoning_content:
            before.reasoning_content = (before.reasoning_content or "") + message.reasoning_content
    return messages


def _is_one_turn(before: schemas.Message, message: schemas.Message) -> bool:
    """Return whether an item goes on with the assistant's turn before: thought, then text, then calls."""
    if not before.role == message.role == "assistant":
        return False
    only_thought = not before.content and not before.tool_calls and before.reasoning_content is not None
    return only_thought or bool(message.tool_calls)


def called(call_id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    """Return a call as chats have it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def requested_tools(request: ResponsesRequest) -> list[schemas.Tool] | None:
    """Return the tools as chats have them.

    Raises:
        InvalidParameter: one is no function; names its place.
    """
    tools = []
    for index, tool in enumerate(request.tools or ()):
        if tool.get("type") != "function":
            place = f"tools[{index}].type"
            raise InvalidParameter(f"{place}: only functions are supported, not {tool.get('type')!r}", place)
        try:
            fields = {name: tool.get(name) for name in ("name", "description", "parameters", "strict")}
            tools.append(schemas.Tool(function=msgspec.convert(fields, schemas.Function)))
        except msgspec.ValidationError as error:
            raise InvalidParameter(f"tools[{index}]: {error}", f"tools[{index}]") from None
    return tools or None


def _message(item: dict[str, Any], place: str) -> schemas.Message:
    match item.get("type", "message"):
        case "message":
            fields: dict[str, Any] = {
                "role": item.get("role"),
                "content": _content(item.get("content"), place),
            }
        case "function_call":
            call = called(item.get("call_id"), item.get("name"), item.get("arguments", "{}"))
            fields = {"role": "assistant", "tool_calls": [call]}
        case "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str) else _content(output, place)
            fields = {"role": "tool", "content": text, "tool_call_id": item.get("call_id")}
        case "reasoning":
            # Some clients keep the thought itself as its summary.
            thought = _content(item.get("content") or item.get("summary") or [], place, _THOUGHTS)
            text = thought if isinstance(thought, str) else "".join(part["text"] or "" for part in thought)
            fields = {"role": "assistant", "content": "", "reasoning_content": text or None}
        case other:
            raise InvalidParameter(f"{place}.type: {other!r} is not supported", f"{place}.type")
    try:
        return msgspec.convert(fields, schemas.Message)
    except msgspec.ValidationError as error:
        raise InvalidParameter(f"{place}: {error}", place) from None


def _content(content: Any, place: str, kinds: tuple[str, ...] = _TEXT_PARTS) -> Any:
    """Return content whose text parts have the name that chats give them."""
    if not isinstance(content, list):
        return content
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            where = f"{place}.content[{index}]"
            raise InvalidParameter(f"{where}: only text parts are supported, not {json.dumps(kind)}", where)
        parts.append({"type": "text", "text": part.get("text", part.get("refusal"))})
    return parts
