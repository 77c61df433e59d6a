"""From an HTTP request to checked values: JSON into a schema, a schema into sampling parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from quart import request

from ullm.errors import EngineNotReady, InvalidParameter, ModelUnknown
from ullm.protocol.messages import ModelInfo
from ullm.sampling import SamplingParams
from ullm.server.api import schemas
from ullm.server.api.errors import InvalidJSON, UnsupportedMediaType, invalid_field
from ullm.server.api.refusals import Refusals
from ullm.server.api.types import EngineInterface, TokenizerInterface

R = TypeVar("R", bound=msgspec.Struct)

_SAMPLING_FIELDS = frozenset(SamplingParams.__dataclass_fields__) & frozenset(
    schemas.GenerationRequest.__struct_fields__
)


TIMEOUT_HEADER = "X-Request-Timeout"
"""Header with a request's timeout in seconds, for clients that cannot add a field to the body."""


def json_reader(schema: type[R], *, optional: bool = False) -> Callable[[], Any]:
    """Return an async function that reads the current request's body as ``schema``.

    Args:
        optional: an empty body stands for an empty object.
    """
    decoder, refusals = msgspec.json.Decoder(schema), Refusals(schema)

    async def read() -> R:
        body: bytes = await request.get_data(as_text=False)  # type: ignore[assignment]
        if optional and not body:
            return _decode(decoder, b"{}")
        mimetype = request.mimetype
        if mimetype and mimetype != "application/json" and not mimetype.endswith("+json"):
            raise UnsupportedMediaType(f"the content type must be application/json, not {mimetype}")
        fields = _decode(decoder, body)
        if refusals:
            refusals.check(_decode(refusals.decoder, body))
        return fields

    return read


def _decode(decoder: msgspec.json.Decoder[R], body: bytes) -> R:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidJSON(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidJSON("the body's JSON is nested too deeply") from None


def with_query(body: R) -> R:
    """Return ``body`` with the fields that it leaves out taken from the current request's query.

    Raises:
        InvalidParameter: a value is of the wrong type; names the field.
    """
    schema = type(body)
    parameters = {name: request.args[name] for name in schema.__struct_fields__ if name in request.args}
    try:
        fields = msgspec.convert(parameters, schema, strict=False)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from None
    present = {name: value for name, value in msgspec.structs.asdict(body).items() if value is not None}
    return msgspec.structs.replace(fields, **present)


def check_query(names: Sequence[str]) -> None:
    """Return if the current request's query has these parameters only, each once at most.

    Raises:
        InvalidParameter: it has another; names it, with its value.
    """
    for name, values in request.args.lists():
        if name not in names:
            known = " and ".join(names) or "none"
            raise InvalidParameter(
                f"{request.path} does not take {name}={','.join(values)}; parameters of its query: {known}",
                name,
            )
        if len(values) > 1:
            raise InvalidParameter(f"{name} is given {len(values)} times in the query", name)


def check_model(engine: EngineInterface, model: str | None) -> None:
    """Check that a request names the served model by one of its names, or not at all.

    Raises:
        ModelUnknown: it names another.
    """
    names = engine.config.model_names
    if model is not None and model not in names:
        raise ModelUnknown(model, ", ".join(map(repr, names)))


def loaded(engine: EngineInterface) -> tuple[ModelInfo, TokenizerInterface]:
    """Return the model's description and its tokenizer.

    Raises:
        EngineNotReady: the model is still loading.
    """
    if engine.info is None or engine.tokenizer is None:
        raise EngineNotReady(str(engine.state))
    return engine.info, engine.tokenizer


def sampling_params(fields: schemas.GenerationRequest, **others: Any) -> SamplingParams:
    """Return the sampling parameters of a request.

    Args:
        others: override the request's fields. None means the default.

    Raises:
        InvalidParameter: a value is out of range; names the field.
    """
    values = {name: getattr(fields, name) for name in _SAMPLING_FIELDS} | others
    if values["timeout"] is None:
        values["timeout"] = header_timeout()
    params = SamplingParams(**{name: value for name, value in values.items() if value is not None})
    if fields.stream_options is not None and not fields.stream:
        raise InvalidParameter("stream_options needs stream to be true", "stream_options")
    if fields.stream_options is not None and fields.stream_options.continuous_usage_stats:
        raise InvalidParameter(
            "stream_options.continuous_usage_stats is not supported; the usage comes at the end, with "
            "include_usage",
            "stream_options.continuous_usage_stats",
        )
    return params


def header_timeout() -> float | None:
    """Return the timeout in the current request's header, in seconds.

    Raises:
        InvalidParameter: it is not a number of seconds.
    """
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InvalidParameter(
            f"{TIMEOUT_HEADER} must be a number of seconds, at least 0, got {text!r}", TIMEOUT_HEADER
        )
    return seconds


def template_messages(messages: list[schemas.Message]) -> list[dict[str, Any]]:
    """Return messages in the form that chat templates expect.

    ``developer`` is OpenAI's newer name of ``system``, which templates do not know. Text parts are
    joined by newlines. Arguments of earlier tool calls become objects, which is what templates render.

    Raises:
        InvalidParameter: there are no messages, or a part is not text.
    """
    if not messages:
        raise InvalidParameter("messages is empty; it must have at least one message", "messages")
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: schemas.Message, place: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if message.content is None and not (role == "assistant" and message.tool_calls):
        raise InvalidParameter(f"{place}.content is missing", f"{place}.content")
    for name in ("function_call", "audio"):
        if getattr(message, name) is not None:
            raise InvalidParameter(f"{place}.{name} is not supported", f"{place}.{name}")
    turn: dict[str, Any] = {"role": role, "content": _text(message.content, place)}
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            turn[name] = getattr(message, name)
    if message.tool_calls:
        turn["tool_calls"] = [
            _tool_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(message.tool_calls)
        ]
    return turn


def _text(content: str | list[schemas.ContentPart] | None, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for index, part in enumerate(content):
        where = f"{place}.content[{index}]"
        if part.type != "text":
            raise InvalidParameter(f"{where}: only text parts are supported, not {part.type!r}", where)
        if part.text is None:
            raise InvalidParameter(f"{where}.text is missing", f"{where}.text")
    return "\n".join(part.text or "" for part in content)


def _tool_call(call: schemas.ToolCall, place: str) -> dict[str, Any]:
    where = f"{place}.function.arguments"
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        raise InvalidParameter(f"{where} is not JSON", where) from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}


_RESERVED_KWARGS = frozenset({"messages", "conversation", "tools", "add_generation_prompt", "self"})


async def encode_conversation(
    tokenizer: TokenizerInterface,
    messages: list[schemas.Message],
    tools: list[schemas.Tool] | None,
    add_generation_prompt: bool | None,
    kwargs: dict[str, Any] | None,
) -> list[int]:
    """Return the tokens of a conversation.

    Raises:
        InvalidParameter: the template does not accept the messages or the arguments.
    """
    reserved = _RESERVED_KWARGS.intersection(kwargs or {})
    if reserved:
        name = min(reserved)
        raise InvalidParameter(
            f"chat_template_kwargs: {name!r} is set by the server; use the request's own field",
            "chat_template_kwargs",
        )
    return await tokenizer.encode_chat(
        template_messages(messages),
        add_generation_prompt=add_generation_prompt is not False,
        tools=[_tool(tool) for tool in tools] if tools else None,
        **(kwargs or {}),
    )


def _tool(tool: schemas.Tool) -> dict[str, Any]:
    function = {
        key: value for key, value in msgspec.structs.asdict(tool.function).items() if value is not None
    }
    return {"type": tool.type, "function": function}
