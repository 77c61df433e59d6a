"""``/v1/models``, ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

import time

from quart import Response
from quart_trio import QuartTrio

from ullm.errors import InvalidParameter
from ullm.server.api import requests
from ullm.server.api.responses import Detokenized, ModelCard, ModelList, Tokenized, json_response
from ullm.server.api.schemas import DetokenizeRequest, TokenizeRequest
from ullm.server.api.types import Engine, Tokenizer


def install(app: QuartTrio, engine: Engine) -> None:
    """Add the routes to ``app``."""
    created = int(time.time())
    read_tokenize = requests.json_reader(TokenizeRequest)
    read_detokenize = requests.json_reader(DetokenizeRequest)

    def card() -> ModelCard:
        info = engine.info
        limit = None if info is None else info.context_len
        return ModelCard(id=engine.model_name, created=created, max_model_len=limit)

    async def models() -> Response:
        return json_response(ModelList(data=[card()]))

    async def model(name: str) -> Response:
        requests.check_model(engine, name)
        return json_response(card())

    async def tokenize() -> Response:
        info, tokenizer = requests.loaded(engine)
        request: TokenizeRequest = await read_tokenize()
        requests.check_model(engine, request.model)
        tokens = await _tokenize(request, tokenizer)
        answer = Tokenized(tokens=tokens, count=len(tokens), max_model_len=info.context_len)
        if request.return_token_strs:
            answer.token_strs = [tokenizer.token_text(token) for token in tokens]
        return json_response(answer)

    async def detokenize() -> Response:
        info, tokenizer = requests.loaded(engine)
        request: DetokenizeRequest = await read_detokenize()
        requests.check_model(engine, request.model)
        requests.check_token_ids(request.tokens, info.vocab_size, "tokens")
        skip = bool(request.skip_special_tokens)
        return json_response(Detokenized(tokenizer.decode(request.tokens, skip_special_tokens=skip)))

    app.get("/v1/models")(models)
    app.get("/v1/models/<path:name>")(model)
    app.post("/tokenize")(tokenize)
    app.post("/detokenize")(detokenize)


async def _tokenize(request: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
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
