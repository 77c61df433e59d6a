"""``/v1/models``, ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from quart import Response

from ullm.errors import InvalidParameter
from ullm.server.api import requests
from ullm.server.api.responses import Detokenized, ModelCard, ModelList, Tokenized, json_response
from ullm.server.api.schemas import DetokenizeRequest, TokenizeRequest
from ullm.server.api.types import TokenizerInterface
from ullm.server.routes.service import Service


async def list_models(service: Service) -> Response:
    """List the served model."""
    return json_response(ModelList(data=[_card(service)]))


async def show_model(service: Service, model: str) -> Response:
    """Describe the served model."""
    requests.check_model(service.engine, model)
    return json_response(_card(service))


def _card(service: Service) -> ModelCard:
    info = service.engine.info
    limit = None if info is None else info.context_len
    return ModelCard(id=service.engine.model_name, created=service.created, max_model_len=limit)


async def tokenize(service: Service, request: TokenizeRequest) -> Response:
    """Return the tokens of a prompt or a conversation."""
    info, tokenizer = requests.loaded(service.engine)
    requests.check_model(service.engine, request.model)
    tokens = await _tokenize(request, tokenizer)
    answer = Tokenized(tokens=tokens, count=len(tokens), max_model_len=info.context_len)
    if request.return_token_strs:
        answer.token_strs = [tokenizer.token_text(token) for token in tokens]
    return json_response(answer)


async def _tokenize(request: TokenizeRequest, tokenizer: TokenizerInterface) -> list[int]:
    if (request.prompt is None) == (request.messages is None):
        raise InvalidParameter("give either prompt or messages", "prompt")
    if request.prompt is not None:
        return await tokenizer.encode(
            request.prompt, add_special_tokens=request.add_special_tokens is not False
        )
    return await requests.encode_conversation(
        tokenizer,
        request.messages or [],
        request.tools,
        request.add_generation_prompt,
        request.chat_template_kwargs,
    )


async def detokenize(service: Service, request: DetokenizeRequest) -> Response:
    """Return the text of tokens."""
    info, tokenizer = requests.loaded(service.engine)
    requests.check_model(service.engine, request.model)
    _check_vocabulary(request.tokens, info.vocab_size)
    skip = bool(request.skip_special_tokens)
    return json_response(Detokenized(tokenizer.decode(request.tokens, skip_special_tokens=skip)))


def _check_vocabulary(tokens: list[int], vocab_size: int) -> None:
    """Refuse what a tokenizer cannot decode; no engine sees these tokens."""
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise InvalidParameter(
                f"tokens: token id {token} is not in the model's vocabulary of {vocab_size}", "tokens"
            )
