"""``/v1/models``, ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

import trio
from quart import Response

from ullm.config import ServerConfig
from ullm.errors import InvalidParameter
from ullm.server.api import requests
from ullm.server.api.responses import Detokenized, ModelCard, ModelList, Tokenized, json_response
from ullm.server.api.schemas import DetokenizeRequest, TokenizeRequest
from ullm.server.api.tool_use import as_dicts
from ullm.server.api.types import TokenizerInterface
from ullm.server.routes.service import Service

TOKENS_AT_ONCE = 10_000
"""Tokens that are put into words before other tasks run."""


async def list_models(service: Service) -> Response:
    """List the served model under all its names, and its adapters."""
    engine = service.engine
    names = [*engine.config.model_names, *(adapter.name for adapter in engine.adapters)]
    return json_response(ModelList(data=[_card(service, name) for name in names]))


async def show_model(service: Service, model: str) -> Response:
    """Describe the served model, or an adapter."""
    requests.check_model(service.engine, model)
    return json_response(_card(service, model))


def _card(service: Service, name: str) -> ModelCard:
    info = service.engine.info
    limit = None if info is None else info.context_len
    adapter = next((each for each in service.engine.adapters if each.name == name), None)
    return ModelCard(
        id=name,
        created=service.created,
        max_model_len=limit,
        sampling_defaults=service.engine.sampling_defaults,
        parent=None if adapter is None else service.engine.model_name,
        root=None if adapter is None else adapter.path,
    )


async def tokenize(service: Service, request: TokenizeRequest) -> Response:
    """Return the tokens of a prompt or a conversation."""
    info, tokenizer = requests.loaded(service.engine)
    requests.check_model(service.engine, request.model)
    tokens = await _tokenize(request, tokenizer, service.config)
    answer = Tokenized(tokens=tokens, count=len(tokens), max_model_len=info.context_len)
    if request.return_token_strs:
        answer.token_strs = []
        for start in range(0, len(tokens), TOKENS_AT_ONCE):
            answer.token_strs += map(tokenizer.token_text, tokens[start : start + TOKENS_AT_ONCE])
            await trio.lowlevel.checkpoint()
    return json_response(answer)


async def _tokenize(
    request: TokenizeRequest, tokenizer: TokenizerInterface, config: ServerConfig
) -> list[int]:
    if (request.prompt is None) == (request.messages is None):
        raise InvalidParameter("give either prompt or messages", "prompt")
    if request.prompt is not None:
        return await tokenizer.encode(
            request.prompt, add_special_tokens=request.add_special_tokens is not False
        )
    return await requests.encode_conversation(tokenizer, request, as_dicts(request.tools), config)


async def tokenizer_info(service: Service) -> Response:
    """Describe the tokenizer, with its chat template."""
    _, tokenizer = requests.loaded(service.engine)
    return json_response(tokenizer.describe())


async def detokenize(service: Service, request: DetokenizeRequest) -> Response:
    """Return the text of tokens."""
    info, tokenizer = requests.loaded(service.engine)
    requests.check_model(service.engine, request.model)
    _check_vocabulary(request.tokens, info.vocab_size)
    skip = bool(request.skip_special_tokens)
    return json_response(Detokenized(tokenizer.decode(request.tokens, skip_special_tokens=skip)))


def _check_vocabulary(tokens: list[int], vocab_size: int) -> None:
    """Refuse what a tokenizer cannot decode; no engine sees these tokens."""
    for token in (min(tokens, default=0), max(tokens, default=0)):
        if not 0 <= token < vocab_size:
            raise InvalidParameter(
                f"tokens: token id {token} is not in the model's vocabulary of {vocab_size}", "tokens"
            )
