"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Sequence

from quart import Response, g

from ullm.engine.sampling_defaults import SamplingDefaults
from ullm.errors import InvalidParameter
from ullm.protocol.messages import ModelInfo
from ullm.sampling import SamplingParams
from ullm.server.api import requests
from ullm.server.api.answers import AnswerHead
from ullm.server.api.completion_answer import CompletionAnswer, Prompt
from ullm.server.api.schemas import CompletionRequest
from ullm.server.api.types import TokenizerInterface
from ullm.server.routes import stored_completions
from ullm.server.routes.outputs import Submission
from ullm.server.routes.service import Service

DEFAULT_MAX_TOKENS = 16
"""Default of ``max_tokens`` on this route, as in OpenAI's API."""


async def completions(service: Service, request: CompletionRequest) -> Response:
    """Continue one or several prompts, streamed or whole."""
    engine = service.engine
    info, tokenizer = requests.loaded(engine)
    lora = requests.check_model(engine, request.model)
    _check(request)
    if (resumed := await stored_completions.resume(service, request)) is not None:
        return resumed
    prompts = [_truncated(prompt, request, info.context_len) for prompt in await _prompts(request, tokenizer)]
    params = _params(request, engine.sampling_defaults, info, prompts, lora)
    head = AnswerHead(f"cmpl-{g.request_id}", lora or engine.model_name)
    if stored_completions.is_stored(service, request):
        return await stored_completions.answer(service, request, head.id, prompts, params)
    limit_field, limit = requests.token_limit(request)
    submission = Submission(
        head.id,
        [prompt.token_ids for prompt in prompts],
        params,
        g.arrived,
        client=g.client,
        session=requests.header_session(),
        limit_field=limit_field,
    )
    outputs = service.outputs(submission)
    answer = CompletionAnswer(
        head,
        request,
        prompts,
        tokenizer,
        outputs.prompt_logprobs,
        requests.answer_style(request, service.config),
        only_echo=bool(request.echo) and limit == 0,
    )
    return await (service.stream if request.stream else service.whole)(outputs, answer)


def _check(request: CompletionRequest) -> None:
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidParameter("best_of is only supported when it equals n", "best_of")


async def _prompts(request: CompletionRequest, tokenizer: TokenizerInterface) -> list[Prompt]:
    """Return the prompts as tokens. The engine refuses those that are empty or not in the vocabulary."""
    prompt = request.prompt
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        entries: Sequence[str | int | list[int]] = [prompt]  # type: ignore[list-item]  # checked in _prompt
    else:
        entries = prompt
    special = request.add_special_tokens is not False
    return [await _prompt(entry, tokenizer, special) for entry in entries]


async def _prompt(entry: str | int | list[int], tokenizer: TokenizerInterface, special: bool) -> Prompt:
    if isinstance(entry, str):
        return Prompt(await tokenizer.encode(entry, add_special_tokens=special), entry)
    if isinstance(entry, list) and all(isinstance(token_id, int) for token_id in entry):
        return Prompt(entry)
    raise InvalidParameter("prompt must be a text, token ids, or a list of either, not a mixture", "prompt")


def _truncated(prompt: Prompt, request: CompletionRequest, context_len: int) -> Prompt:
    tokens = requests.truncated(prompt.token_ids, request, context_len)
    return prompt if len(tokens) == len(prompt.token_ids) else Prompt(tokens)


def _params(
    request: CompletionRequest,
    defaults: SamplingDefaults,
    info: ModelInfo,
    prompts: list[Prompt],
    lora: str | None,
) -> SamplingParams:
    """Return the sampling parameters; ``max_tokens`` 0 is possible with ``echo``, to score a prompt."""
    _, max_tokens = requests.token_limit(request)
    if max_tokens is None:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, info.context_len - longest))
        max_tokens = max(max_tokens, request.min_tokens or 0)
    elif max_tokens == 0 and request.echo:
        max_tokens = 1
    scores = request.logprobs if request.echo and request.prompt_logprobs is None else request.prompt_logprobs
    return requests.sampling_params(
        request,
        defaults,
        max_tokens=max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=scores,
        lora=lora,
    )
