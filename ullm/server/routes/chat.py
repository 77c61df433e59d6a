"""``POST /v1/chat/completions``."""

from __future__ import annotations

from quart import Response, g

from ullm.errors import InvalidParameter
from ullm.sampling import MAX_LOGPROBS, SamplingParams
from ullm.server.api import requests
from ullm.server.api.answers import AnswerHead
from ullm.server.api.chat_answer import ChatAnswer
from ullm.server.api.schemas import ChatCompletionRequest
from ullm.server.routes.outputs import Submission
from ullm.server.routes.service import Service


async def chat_completions(service: Service, request: ChatCompletionRequest) -> Response:
    """Answer a conversation, streamed or whole."""
    engine = service.engine
    _, tokenizer = requests.loaded(engine)
    requests.check_model(engine, request.model)
    _check(request)
    params = _params(request)
    prompt = await requests.encode_conversation(
        tokenizer,
        request.messages,
        None,  # tools are refused, except where they are not to be called
        request.add_generation_prompt,
        request.chat_template_kwargs,
    )
    head = AnswerHead(f"chatcmpl-{g.request_id}", engine.model_name)
    outputs = service.outputs(Submission(head.id, [prompt], params, g.arrived, prompt_field="messages"))
    answer = ChatAnswer(head, tokenizer, params.n, outputs.prompt_logprobs, with_usage=request.wants_usage)
    return await (service.stream if request.stream else service.whole)(outputs, answer)


def _check(request: ChatCompletionRequest) -> None:
    if request.top_logprobs is not None:
        if not request.logprobs:
            raise InvalidParameter("top_logprobs needs logprobs to be true", "top_logprobs")
        if not 0 <= request.top_logprobs <= MAX_LOGPROBS:
            raise InvalidParameter(
                f"top_logprobs must be from 0 to {MAX_LOGPROBS}, got {request.top_logprobs}", "top_logprobs"
            )


def _params(request: ChatCompletionRequest) -> SamplingParams:
    if request.max_completion_tokens is not None and request.max_completion_tokens < 1:
        raise InvalidParameter(
            f"max_completion_tokens must be at least 1, got {request.max_completion_tokens}",
            "max_completion_tokens",
        )
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return requests.sampling_params(request, max_tokens=limit, logprobs=logprobs)
