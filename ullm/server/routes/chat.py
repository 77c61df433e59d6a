"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Any

from quart import Response, g

from ullm.engine.sampling_defaults import SamplingDefaults
from ullm.errors import InvalidParameter
from ullm.parsing.tool_use import constrained, read_as
from ullm.sampling import MAX_LOGPROBS, SamplingParams
from ullm.server.api import requests
from ullm.server.api.answers import AnswerHead
from ullm.server.api.chat_answer import ChatAnswer
from ullm.server.api.completion_answer import Prompt
from ullm.server.api.logprobs import TokenIdNames
from ullm.server.api.schemas import ChatCompletionRequest
from ullm.server.api.tool_use import tool_use
from ullm.server.routes import stored_completions
from ullm.server.routes.outputs import Submission
from ullm.server.routes.service import Service


async def chat_completions(service: Service, request: ChatCompletionRequest) -> Response:
    """Answer a conversation, streamed or whole."""
    engine = service.engine
    info, tokenizer = requests.loaded(engine)
    lora = requests.check_model(engine, request.model)
    _check(request)
    if (resumed := await stored_completions.resume(service, request)) is not None:
        return resumed
    use, params = tool_use(request), _params(request, engine.sampling_defaults, lora)
    prompt = await requests.encode_conversation(
        tokenizer, request, use.tools, service.config, _template_kwargs(request)
    )
    prompt = requests.truncated(prompt, request, info.context_len)
    chat = service.chat_format(tokenizer)
    how = read_as(use, chat, tokenizer, prompt)
    params = constrained(params, use.structured_outputs(chat.calls), how)
    head = AnswerHead(f"chatcmpl-{g.request_id}", lora or engine.model_name)
    if stored_completions.is_stored(service, request):
        return await stored_completions.answer(service, request, head.id, [Prompt(prompt)], params)
    limit_field, _ = requests.token_limit(request)
    submission = Submission(
        head.id,
        [prompt],
        params,
        g.arrived,
        prompt_field="messages",
        client=g.client,
        session=requests.header_session(),
        limit_field=limit_field,
    )
    outputs = service.outputs(submission)
    answer = ChatAnswer(
        head,
        TokenIdNames(tokenizer) if request.return_tokens_as_token_ids else tokenizer,
        params.n,
        outputs.prompt_logprobs,
        requests.answer_style(request, service.config),
        prompt=prompt,
        begin=requests.echoed(request),
        reading=how,
        reasoning=request.include_reasoning is not False,
    )
    return await (service.stream if request.stream else service.whole)(outputs, answer)


def _template_kwargs(request: ChatCompletionRequest) -> dict[str, Any]:
    effort = {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}
    return {**effort, **(request.chat_template_kwargs or {})}


def _check(request: ChatCompletionRequest) -> None:
    if request.top_logprobs is not None:
        if not request.logprobs:
            raise InvalidParameter("top_logprobs needs logprobs to be true", "top_logprobs")
        if not 0 <= request.top_logprobs <= MAX_LOGPROBS:
            raise InvalidParameter(
                f"top_logprobs must be from 0 to {MAX_LOGPROBS}, got {request.top_logprobs}", "top_logprobs"
            )


def _params(request: ChatCompletionRequest, defaults: SamplingDefaults, lora: str | None) -> SamplingParams:
    _, limit = requests.token_limit(request)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return requests.sampling_params(request, defaults, max_tokens=limit, logprobs=logprobs, lora=lora)
