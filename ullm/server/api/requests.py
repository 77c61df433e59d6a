"""From an HTTP request to checked values: JSON into a schema, a schema into sampling parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
from quart import g, request

from ullm.config import ServerConfig
from ullm.engine.sampling_defaults import SamplingDefaults
from ullm.errors import EngineNotReady, InvalidParameter, ModelUnknown
from ullm.protocol.messages import ModelInfo
from ullm.sampling import SamplingParams
from ullm.server.api import limits, schemas
from ullm.server.api.answers import AnswerStyle
from ullm.server.api.body_parser import BodyParser
from ullm.server.api.errors import invalid_field
from ullm.server.api.json_body import read_body
from ullm.server.api.nested_fields import Unknown
from ullm.server.api.pooling_schemas import EmbeddingsRequest
from ullm.server.api.refusals import UnknownFields
from ullm.server.api.structured import requested_form
from ullm.server.api.types import EngineInterface, TokenizerInterface
from ullm.tokenization.described_tools import fit_to_template, with_documents

R = TypeVar("R", bound=msgspec.Struct)
T = TypeVar("T")

_SAMPLING_FIELDS = frozenset(SamplingParams.__dataclass_fields__) & frozenset(
    schemas.GenerationRequest.__struct_fields__
)

ParseLarge = Callable[[bytes, type[Any]], Awaitable[tuple[Any, list[Unknown]]]]
"""As `LargeBodies.parse`: what `BodyParser.parse` does, elsewhere."""

TIMEOUT_HEADER = "X-Request-Timeout"
SESSION_HEADER = "X-Session-Id"
_SESSION = re.compile(r"[!-~]{1,128}")
"""Header with a request's timeout in seconds, for clients that cannot add a field to the body."""
IGNORED_HEADER = "X-Ullm-Ignored-Fields"
"""Header of an answer that names the fields of the request which nobody knows, and which were ignored."""
_LIMITS = ("max_completion_tokens", "max_tokens", "max_new_tokens")
"""Names of the limit of generated tokens: OpenAI's newer one, its older one, and transformers'."""


def json_reader(
    schema: type[R],
    config: ServerConfig,
    unknown: UnknownFields,
    parse_large: ParseLarge,
    *,
    optional: bool = False,
) -> Callable[[], Any]:
    """Return an async function that reads the current request's body as ``schema``.

    Args:
        config: limits of what a body has.
        unknown: what happens to fields that nobody knows.
        parse_large: parses what would hold the event loop.
        optional: an empty body stands for an empty object.
    """
    parser = BodyParser(schema, config)

    async def read() -> R:
        body = await read_body(optional=optional)
        if optional and not body:
            body = b"{}"
        fields: R
        if len(body) > limits.MOST_BODY:
            fields, unknown_ones = await parse_large(body, schema)
        else:
            fields, unknown_ones = parser.parse(body)
        if ignored := unknown.meet(unknown_ones):
            g.common_headers |= {IGNORED_HEADER: ", ".join(map(quote, ignored))}
        return fields

    return read


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


def check_model(engine: EngineInterface, model: str | None) -> str | None:
    """Check that a request names the served model by one of its names, or an adapter, or nothing.

    Returns:
        The adapter's name; None if it is the model itself.

    Raises:
        ModelUnknown: it names another.
    """
    if model is not None and model in engine.adapters:
        return model
    names = engine.config.model_names
    if model is not None and model not in names:
        served = [*names, *(adapter.name for adapter in engine.adapters)]
        raise ModelUnknown(model, ", ".join(map(repr, served)))
    return None


def loaded(engine: EngineInterface) -> tuple[ModelInfo, TokenizerInterface]:
    """Return the model's description and its tokenizer.

    Raises:
        EngineNotReady: the model is still loading.
    """
    if engine.info is None or engine.tokenizer is None:
        raise EngineNotReady(str(engine.state))
    return engine.info, engine.tokenizer


def token_limit(fields: msgspec.Struct) -> tuple[str, int | None]:
    """Return the limit of generated tokens, and the name by which the client has sent it.

    OpenAI's newer name, ``max_completion_tokens``, wins over its older one.

    Raises:
        InvalidParameter: two other names have different values.
    """
    given = {name: value for name in _LIMITS if (value := getattr(fields, name, None)) is not None}
    if not given:
        return "max_tokens", None
    names = list(given)
    if names == ["max_tokens", "max_new_tokens"] and len(set(given.values())) > 1:
        raise InvalidParameter("max_tokens and max_new_tokens are two names of one value", "max_new_tokens")
    return names[0], given[names[0]]


def sampling_params(
    fields: schemas.GenerationRequest, defaults: SamplingDefaults, **others: Any
) -> SamplingParams:
    """Return the sampling parameters of a request.

    Args:
        defaults: the model's, for what the request leaves out.
        others: override the request's fields; ``max_tokens`` its limit under any name. None means the
            default.

    Raises:
        InvalidParameter: a value is out of range; names the field.
    """
    values = {name: getattr(fields, name) for name in _SAMPLING_FIELDS} | others
    values["structured_outputs"] = requested_form(fields)
    if values["timeout"] is None:
        values["timeout"] = header_timeout()
    values["max_new_tokens"] = None
    try:
        params = defaults.params(**{name: value for name, value in values.items() if value is not None})
    except InvalidParameter as error:
        error.rename_field("max_tokens", token_limit(fields)[0])
        raise
    if fields.stream_options is not None and not fields.stream:
        raise InvalidParameter("stream_options needs stream to be true", "stream_options")
    return params


def answer_style(fields: schemas.GenerationRequest, config: ServerConfig) -> AnswerStyle:
    """Return what the client, and the server's operator, want to see of an answer."""
    options = fields.stream_options or schemas.StreamOptions()
    return AnswerStyle(
        usage=bool(options.include_usage),
        running_usage=bool(options.continuous_usage_stats),
        token_ids=bool(fields.return_token_ids),
        openai_reasons=config.openai_finish_reasons,
    )


def truncated(
    prompt: list[int], fields: schemas.GenerationRequest | EmbeddingsRequest, context_len: int
) -> list[int]:
    """Return the part of a prompt that the request asks for; all of it by default.

    Raises:
        InvalidParameter: it asks for less than one token.
    """
    most = fields.truncate_prompt_tokens
    if most is None:
        return prompt
    if most == -1:  # as many as leave room for the text
        most = max(1, context_len - max(1, token_limit(fields)[1] or 1))
    if most < 1:
        raise InvalidParameter(
            f"truncate_prompt_tokens must be at least 1, or -1, got {most}", "truncate_prompt_tokens"
        )
    return prompt[:most] if fields.truncation_side == "right" else prompt[-most:]


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


def header_session() -> str:
    """Return the session in the current request's header, or an empty text.

    Raises:
        InvalidParameter: it is not a name.
    """
    text = request.headers.get(SESSION_HEADER, "")
    if text and not _SESSION.fullmatch(text):
        raise InvalidParameter(
            f"{SESSION_HEADER} must have 1 to 128 visible ASCII characters", SESSION_HEADER
        )
    return text


def template_messages(messages: list[schemas.Message]) -> list[dict[str, Any]]:
    """Return messages in the form that chat templates expect.

    ``developer`` is OpenAI's newer name of ``system``, and ``function`` the older one of ``tool``. Text parts
    are joined by newlines. Arguments of earlier calls become objects, which is what templates render.

    Raises:
        InvalidParameter: there are no messages, or a part is not text.
    """
    if not messages:
        raise InvalidParameter("messages is empty; it must have at least one message", "messages")
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: schemas.Message, place: str) -> dict[str, Any]:
    role = _ROLES.get(message.role, message.role)
    if message.content is None and role != "assistant":
        raise InvalidParameter(f"{place}.content is missing", f"{place}.content")
    if message.audio is not None:
        raise InvalidParameter(f"{place}.audio is not supported", f"{place}.audio")
    content = message.refusal if message.content is None else message.content
    turn: dict[str, Any] = {"role": role, "content": _text(content, place)}
    reasoning = message.reasoning_content or message.reasoning
    for name, value in (
        ("name", message.name),
        ("tool_call_id", message.tool_call_id),
        ("reasoning_content", reasoning),
    ):
        if value is not None:
            turn[name] = value
    calls = list(message.tool_calls or ())
    if message.function_call is not None and not calls:
        calls = [schemas.ToolCall(function=message.function_call)]
    if calls:
        turn["tool_calls"] = [_tool_call(call) for call in calls]
    return turn


def echoed(request: schemas.ChatCompletionRequest) -> str:
    """Return the text that the answer begins with: the last message, if the answer is of the same role."""
    last = request.messages[-1]
    if not request.echo or last.role != "assistant":
        return ""
    return str(template_messages([last])[0]["content"])


def _text(content: str | list[schemas.ContentPart] | None, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        where = f"{place}.content[{index}]"
        if part.type not in ("text", "refusal"):
            raise InvalidParameter(f"{where}: only text parts are supported, not {part.type!r}", where)
        text = part.text if part.type == "text" else part.refusal
        if text is None:
            raise InvalidParameter(f"{where}.{part.type} is missing", f"{where}.{part.type}")
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: schemas.ToolCall) -> dict[str, Any]:
    """Return a call with arguments as an object; those that are not JSON stay as the model wrote them."""
    arguments: Any = call.function.arguments or "{}"
    if isinstance(arguments, str):
        with suppress(msgspec.DecodeError, RecursionError):
            arguments = msgspec.json.decode(arguments)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}


_ROLES = {"developer": "system", "function": "tool"}
"""OpenAI's names of roles that templates do not know."""
_RESERVED_KWARGS = frozenset(
    {
        *("messages", "conversation", "tools", "add_generation_prompt", "self"),
        *("continue_final_message", "chat_template"),
    }
)


async def encode_conversation(
    tokenizer: TokenizerInterface,
    request: schemas.ChatCompletionRequest | schemas.TokenizeRequest,
    tools: list[dict[str, Any]] | None,
    config: ServerConfig,
    kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Return the tokens of a conversation.

    Args:
        config: says whether the request may bring a template.
        kwargs: further arguments of the template; by default those of the request.

    Raises:
        InvalidParameter: the template does not accept the messages or the arguments.
    """
    kwargs = kwargs or request.chat_template_kwargs
    _check_kwargs(kwargs)
    return await encode_turns(
        tokenizer,
        template_messages(request.messages or []),
        tools,
        kwargs,
        add_generation_prompt=_begins_turn(request),
        rendering=_rendering(request, config),
    )


def _begins_turn(request: schemas.ChatCompletionRequest | schemas.TokenizeRequest) -> bool:
    """Whether the prompt ends with the beginning of the assistant's turn; not if the last message goes on."""
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidParameter(
            "continue_final_message goes on in the last message, add_generation_prompt begins a new one: "
            "only one of them can be true",
            "continue_final_message",
        )
    return request.add_generation_prompt is not False and not request.continue_final_message


def _rendering(
    request: schemas.ChatCompletionRequest | schemas.TokenizeRequest, config: ServerConfig
) -> dict[str, Any]:
    """Return the arguments of the rendering that the request has fields for."""
    if request.chat_template and not config.trust_request_chat_template:
        raise InvalidParameter(
            "chat_template is not accepted here; start the server with --trust-request-chat-template, or "
            "with --chat-template FILE",
            "chat_template",
        )
    given = {
        "continue_final_message": request.continue_final_message or None,
        "documents": request.documents,
        "chat_template": request.chat_template or None,
    }
    twice = next(
        (name for name in given if given[name] and name in (request.chat_template_kwargs or {})), None
    )
    if twice is not None:
        raise InvalidParameter(f"{twice} is also in chat_template_kwargs; give one of them", twice)
    return {name: value for name, value in given.items() if value is not None}


async def encode_turns(
    tokenizer: TokenizerInterface,
    turns: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    kwargs: dict[str, Any] | None,
    *,
    add_generation_prompt: bool = True,
    rendering: Mapping[str, Any] = {},
) -> list[int]:
    """Return the tokens of a conversation that `template_messages` has made.

    What the template has no place for, tools, earlier calls or documents, becomes text.

    Args:
        rendering: arguments of the rendering that the request has fields for.

    Raises:
        InvalidParameter: the template does not accept the messages or the arguments.
    """
    _check_kwargs(kwargs)
    turns, tools = fit_to_template(tokenizer.chat_format, turns, tools)
    documents = rendering.get("documents")
    if documents and "chat_template" not in rendering and not tokenizer.chat_format.shows_documents:
        turns = with_documents(turns, documents)
    return await tokenizer.encode_chat(
        turns, add_generation_prompt=add_generation_prompt, tools=tools or None, **(kwargs or {}), **rendering
    )


def _check_kwargs(kwargs: dict[str, Any] | None) -> None:
    """Refuse arguments of the template that the server sets itself."""
    reserved = _RESERVED_KWARGS.intersection(kwargs or {})
    if reserved:
        name = min(reserved)
        raise InvalidParameter(
            f"chat_template_kwargs: {name!r} is set by the server; use the request's own field",
            "chat_template_kwargs",
        )
