"""``/v1/embeddings``, ``/v1/score`` and ``/v1/rerank``: what the model makes of prompts, without a text."""

from __future__ import annotations

import base64
import math
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from quart import Response, g

from ullm.config import EngineConfig
from ullm.engine.embedding import at_once, unit
from ullm.errors import InvalidParameter
from ullm.protocol.messages import TokenLogprobs
from ullm.sampling import SamplingParams
from ullm.server.api import requests
from ullm.server.api.errors import CutShort
from ullm.server.api.pooling_schemas import (
    Embedding,
    Embeddings,
    EmbeddingsRequest,
    PromptUsage,
    Ranked,
    Ranking,
    RerankDocument,
    RerankRequest,
    Score,
    ScoreRequest,
    Scores,
)
from ullm.server.api.responses import json_response
from ullm.server.api.types import TokenizerInterface
from ullm.server.http.pacing import unhurried
from ullm.server.routes.outputs import Outputs, Submission
from ullm.server.routes.service import Service

SEPARATOR = "\n"
"""Between a document and the query whose likelihood after it is the score."""


async def embeddings(service: Service, request: EmbeddingsRequest) -> Response:
    """Return a vector per prompt."""
    info, tokenizer = requests.loaded(service.engine)
    lora = requests.check_model(service.engine, request.model)
    special = request.add_special_tokens is not False
    prompts = [
        requests.truncated(await _tokens(tokenizer, each, special), request, info.context_len)
        for each in _inputs(request.input)
    ]
    params = SamplingParams(
        pooling=request.pooling or service.config.pooling,
        priority=request.priority or 0,
        timeout=requests.header_timeout(),
        lora=lora,
    )
    vectors = await _of_all(service, prompts, params, "input", lambda outputs, i: outputs.embedding(i))
    _check_dimensions(request.dimensions, len(vectors[0]) if vectors else 0)
    found = vectors if request.normalize is False else list(map(unit, vectors))
    encode = _base64 if request.encoding_format == "base64" else list
    data = [Embedding(index=index, embedding=encode(vector)) for index, vector in enumerate(found)]
    return json_response(
        Embeddings(model=lora or service.engine.model_name, data=data, usage=_usage(prompts))
    )


async def score(service: Service, request: ScoreRequest) -> Response:
    """Score pairs of texts."""
    first, second = _listed(request.text_1), _listed(request.text_2)
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise InvalidParameter(
            f"text_1 has {len(first)} texts and text_2 {len(second)}; give as many, or one for all", "text_2"
        )
    number = 0 if not first or not second else max(len(first), len(second))
    pairs = [(first[i if len(first) > 1 else 0], second[i if len(second) > 1 else 0]) for i in range(number)]
    scores, prompts = await _scores(service, request, pairs, "text_1")
    data = [Score(index=index, score=each) for index, each in enumerate(scores)]
    return json_response(
        Scores(
            id=f"score-{g.request_id}",
            created=int(time.time()),
            model=requests.check_model(service.engine, request.model) or service.engine.model_name,
            data=data,
            usage=_usage(prompts),
        )
    )


async def rerank(service: Service, request: RerankRequest) -> Response:
    """Rank documents by how well they fit a query."""
    texts = [each if isinstance(each, str) else each.text for each in request.documents]
    scores, prompts = await _scores(service, request, [(request.query, text) for text in texts], "documents")
    ranked = [Ranked(index=index, relevance_score=each) for index, each in enumerate(scores)]
    ranked.sort(key=lambda each: -each.relevance_score)
    for each in ranked if request.return_documents is not False else ():
        each.document = RerankDocument(text=texts[each.index])
    return json_response(
        Ranking(
            id=f"rerank-{g.request_id}",
            model=requests.check_model(service.engine, request.model) or service.engine.model_name,
            results=ranked[: request.top_n],
            usage=_usage(prompts),
        )
    )


async def _scores(
    service: Service, request: ScoreRequest | RerankRequest, pairs: list[tuple[str, str]], name: str
) -> tuple[list[float], list[list[int]]]:
    """Return the score of each pair of a query and a document, and the prompts."""
    _, tokenizer = requests.loaded(service.engine)
    lora = requests.check_model(service.engine, request.model)
    if not pairs:
        raise InvalidParameter(f"{name} is empty; it must have at least one text", name)
    prompts, lengths = [], []
    for query, document in pairs:
        if not query:
            raise InvalidParameter("an empty query, or text_1, has no likelihood", name)
        last = await tokenizer.encode(SEPARATOR + query, add_special_tokens=False)
        prompts.append([*await tokenizer.encode(document), *last])
        lengths.append(len(last))
    params = SamplingParams(
        prompt_logprobs=0,
        max_tokens=1,
        priority=request.priority or 0,
        timeout=requests.header_timeout(),
        lora=lora,
    )
    found = await _of_all(service, prompts, params, name, lambda outputs, i: outputs.prompt_logprobs(i))
    return [_likelihood(each, length) for each, length in zip(found, lengths, strict=True)], prompts


def _likelihood(scores: Sequence[TokenLogprobs | None] | None, last: int) -> float:
    """Return the geometric mean of the probabilities of the last tokens of a prompt."""
    found = [each.logprob for each in (scores or ())[-last:] if each is not None]
    return math.exp(math.fsum(found) / len(found)) if found else 0.0


async def _of_all(
    service: Service,
    prompts: list[list[int]],
    params: SamplingParams,
    name: str,
    get: Callable[[Outputs, int], Any],
) -> list[Any]:
    """Have the engine compute all prompts, not too many at once; return what ``get`` finds of each."""
    found = []
    for group in _groups(prompts, service.engine.config):
        submission = Submission(
            f"pool-{g.request_id}", group, params, g.arrived, prompt_field=name, client=g.client
        )
        async with service.outputs(submission).open(unhurried) as outputs:
            async for _, output in outputs:
                if output.finish_reason not in ("length", "stop"):
                    raise CutShort(output.finish_reason)
            found += [get(outputs, index) for index in range(len(group))]
    return found


def _groups(prompts: list[list[int]], config: EngineConfig) -> Iterator[list[list[int]]]:
    """Yield prompts in groups for which an idle engine has room."""
    most, room = at_once(config), config.max_admitted_tokens or sys.maxsize
    group: list[list[int]] = []
    for prompt in prompts:
        if group and (len(group) == most or sum(map(len, group)) + len(group) + len(prompt) >= room):
            yield group
            group = []
        group.append(prompt)
    yield group


def _inputs(given: str | list[Any]) -> list[Any]:
    if isinstance(given, list) and not given:
        raise InvalidParameter("input is empty; it must have at least one prompt", "input")
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


async def _tokens(tokenizer: TokenizerInterface, entry: Any, special: bool) -> list[int]:
    if isinstance(entry, str):
        return await tokenizer.encode(entry, add_special_tokens=special)
    if isinstance(entry, list) and all(isinstance(token_id, int) for token_id in entry):
        return entry
    raise InvalidParameter("input must be a text, token ids, or a list of either, not a mixture", "input")


def _check_dimensions(asked: int | None, own: int) -> None:
    if asked not in (None, own):
        raise InvalidParameter(
            f"dimensions is {asked}, but this model's vectors have {own}, and are not shortened", "dimensions"
        )


def _base64(vector: array[float]) -> str:
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _usage(prompts: list[list[int]]) -> PromptUsage:
    total = sum(map(len, prompts))
    return PromptUsage(prompt_tokens=total, total_tokens=total)
