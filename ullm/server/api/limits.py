"""What one request may cost: limits that are checked before anything is done for it.

The limits are those of `ullm.config.ServerConfig`, one option per class. All of this is linear in what was
sent, and takes milliseconds for the largest body that is accepted by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from ullm.config import ServerConfig
from ullm.errors import InvalidParameter, PromptTooLong
from ullm.protocol.messages import ModelInfo
from ullm.server.api import schemas
from ullm.server.api.message_requests import CountTokensRequest, MessagesRequest
from ullm.server.api.pooling_schemas import EmbeddingsRequest
from ullm.server.api.response_requests import ResponsesRequest

MOST_BODY = 4 << 20
"""Limit of a body by default, in bytes. Parsing one keeps the interpreter's lock and so holds the event loop:
this much for at most 100 ms."""
LEAST_BODY = 1 << 20
MOST_VALUES = 1_200_000
"""Values of a body above `MOST_BODY`; an entry of an object counts for `VALUES_PER_NAME` of them. Making
Python's values of so many takes as long as of a body of `MOST_BODY`, and they are the token ids of a context
of a million."""
VALUES_PER_NAME = 4
BYTES_PER_TOKEN = 256
"""Bytes of JSON for which a token of the model's context leaves room; text has about four, most tokens of
any vocabulary fewer than 64, each character of which may be escaped."""
CONTAINERS_PER_ENTRY = 16
"""Lists and objects in a whole body, for each entry that one list may have. Making one takes a hundred times
as long as reading its two bytes."""
LEAST_CONTAINERS = 4096
MOST_INPUTS = 2048
"""Prompts of one request for embeddings, as in OpenAI's API."""


def body_limit(config: ServerConfig, info: ModelInfo | None) -> int:
    """Return the bytes that a body may have: what was configured, or what the model's context can need."""
    if config.max_body is not None:
        return config.max_body
    needed = MOST_BODY if info is None else BYTES_PER_TOKEN * info.context_len
    return min(max(needed, LEAST_BODY), MOST_BODY)


def check_containers(body: bytes, config: ServerConfig) -> None:
    """Return if a body, not parsed yet, has a bearable number of lists and objects.

    Raises:
        InvalidParameter: it has more.
    """
    limit = _most_containers(config)
    if _within(body, limit, _brackets):
        return
    raise InvalidParameter(
        f"the body has more than {limit} lists and objects, {CONTAINERS_PER_ENTRY} times --max-entries"
    )


def check_values(body: bytes) -> None:
    """Return if a body above `MOST_BODY`, not parsed yet, has a bearable number of values.

    Raises:
        InvalidParameter: it has more.
    """
    if not _within(body, MOST_VALUES, _values):
        raise InvalidParameter(
            f"the body has more than {MOST_VALUES} values, where each entry of an object counts for "
            f"{VALUES_PER_NAME}; send several requests"
        )


def _within(body: bytes, limit: int, count: Callable[[bytes], int]) -> bool:
    """Return whether there are at most ``limit`` of the characters that ``count`` counts outside of texts."""
    if count(body) <= limit:
        return True
    # Without escapes, every other piece between quotes is no text.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    return plain.count(b'"') <= 8 * limit and count(b"".join(plain.split(b'"')[::2])) <= limit


def check_request(request: msgspec.Struct, config: ServerConfig, info: ModelInfo | None) -> None:
    """Return if no field of a request is longer than the configuration allows.

    Raises:
        InvalidParameter: one is; names the field, the limit and the option.
        PromptTooLong: a prompt of token ids does not fit the context.
    """
    for name, value in msgspec.structs.asdict(request).items():
        if isinstance(value, list | dict) and not _is_prompt(request, name):
            _check_entries(name, value, config)
    if isinstance(request, schemas.ChatCompletionRequest | schemas.TokenizeRequest):
        _check_messages(request.messages or [], config)
    if isinstance(request, ResponsesRequest) and not isinstance(request.input, str):
        _check_arguments("input", (item.get("arguments") for item in request.input), config)
    if isinstance(request, EmbeddingsRequest):
        _check_input(request, info)
    if isinstance(request, CountTokensRequest):
        _check_blocks(request, config)
    if isinstance(request, MessagesRequest):
        _check_stop(request.stop_sequences, config, "stop_sequences")
    if isinstance(request, schemas.ChatCompletionRequest):
        _check_choices("n", "choices", request.n or 1, config)
    if isinstance(request, schemas.CompletionRequest):
        _check_prompt(request, config, info)
    if isinstance(request, schemas.DetokenizeRequest) and info is not None:
        _check_number("tokens", len(request.tokens), info.context_len, "the model's context, --context-len")
    if isinstance(request, schemas.GenerationRequest):
        _check_stop(request.stop, config)
    if not config.priority and getattr(request, "priority", None):
        raise InvalidParameter("priority is not taken here: the server runs with --no-priority", "priority")


def _is_prompt(request: msgspec.Struct, name: str) -> bool:
    """Whether a field holds prompts, which other limits bound."""
    return name in ("prompt", "tokens") or (name == "input" and isinstance(request, EmbeddingsRequest))


def _check_input(request: EmbeddingsRequest, info: ModelInfo | None) -> None:
    given = request.input
    several = isinstance(given, list) and given and not isinstance(given[0], int)
    if several and len(given) > MOST_INPUTS:
        raise InvalidParameter(f"input: {len(given)} entries; at most {MOST_INPUTS}", "input")
    shortened = request.truncate_prompt_tokens is not None
    for each in given if several else [given]:
        if info is not None and not shortened and isinstance(each, list) and len(each) >= info.context_len:
            raise PromptTooLong(len(each), info.context_len, "input")


def _check_messages(messages: list[schemas.Message], config: ServerConfig) -> None:
    for index, message in enumerate(messages):
        for name in ("content", "tool_calls"):
            value = getattr(message, name)
            if isinstance(value, list):
                _check_entries(f"messages[{index}].{name}", value, config)
    calls = (call for message in messages for call in message.tool_calls or ())
    _check_arguments("messages", (call.function.arguments for call in calls), config)


def _check_blocks(request: CountTokensRequest, config: ServerConfig) -> None:
    for index, message in enumerate(request.messages):
        if isinstance(message.content, list):
            _check_entries(f"messages[{index}].content", message.content, config)
            for number, block in enumerate(message.content):
                if isinstance(block.content, list):
                    _check_entries(f"messages[{index}].content[{number}].content", block.content, config)


def _check_arguments(name: str, texts: Iterable[Any], config: ServerConfig) -> None:
    """Check the arguments of tool calls, which are JSON within JSON."""
    limit = _most_containers(config)
    if sum(text.count("[") + text.count("{") for text in texts if isinstance(text, str)) > limit:
        raise InvalidParameter(
            f"{name}: the arguments of tool calls have more than {limit} lists and objects, "
            f"{CONTAINERS_PER_ENTRY} times --max-entries",
            name,
        )


def _check_prompt(request: schemas.CompletionRequest, config: ServerConfig, info: ModelInfo | None) -> None:
    prompt = request.prompt
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    prompts: list[Any] = prompt if several else [prompt]  # type: ignore[assignment]  # several: it is a list
    for each in prompts:
        if info is not None and isinstance(each, list) and len(each) >= info.context_len:
            raise PromptTooLong(len(each), info.context_len)
    _check_choices("prompt", "entries", len(prompts), config)
    _check_choices("n", "choices of all prompts together", len(prompts) * (request.n or 1), config)


def _check_choices(name: str, what: str, number: int, config: ServerConfig) -> None:
    if number > config.max_choices:
        raise InvalidParameter(f"{name}: {number} {what}; at most {config.max_choices} (--max-choices)", name)


def _check_stop(stop: str | list[str] | None, config: ServerConfig, name: str = "stop") -> None:
    length = len("".join(stop or ()))
    if length > config.max_stop_chars:
        raise InvalidParameter(
            f"{name} has {length} characters in all; at most {config.max_stop_chars} (--max-stop-chars)", name
        )


def _check_entries(name: str, value: list[Any] | dict[Any, Any], config: ServerConfig) -> None:
    _check_number(name, len(value), config.max_entries, "--max-entries")


def _check_number(name: str, number: int, limit: int, origin: str) -> None:
    if number > limit:
        raise InvalidParameter(f"{name} has {number} entries; at most {limit} ({origin})", name)


def _most_containers(config: ServerConfig) -> int:
    return max(LEAST_CONTAINERS, CONTAINERS_PER_ENTRY * config.max_entries)


def _brackets(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _values(text: bytes) -> int:
    return text.count(b",") + (VALUES_PER_NAME - 1) * text.count(b":")
