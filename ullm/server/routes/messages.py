"""``/v1/messages``: Anthropic's API."""

from __future__ import annotations

from dataclasses import replace

from quart import Response, g

from ullm.errors import InvalidParameter
from ullm.parsing.tool_use import Reading, ToolUse, constrained, read_as
from ullm.sampling import SamplingParams
from ullm.server.api import message_requests, requests
from ullm.server.api.answers import AnswerHead
from ullm.server.api.completion_answer import Prompt
from ullm.server.api.message_answer import MessageAnswer
from ullm.server.api.message_objects import TokenCount
from ullm.server.api.message_requests import CountTokensRequest, MessagesRequest
from ullm.server.api.responses import json_response
from ullm.server.http.sse import ANTHROPIC
from ullm.server.routes import stored_completions
from ullm.server.routes.outputs import Submission
from ullm.server.routes.service import Service


async def create(service: Service, asked: MessagesRequest) -> Response:
    """Answer a conversation, streamed or whole."""
    engine = service.engine
    info, tokenizer = requests.loaded(engine)
    lora = requests.check_model(engine, asked.model)
    g.common_headers |= {"request-id": g.request_id}
    if (resumed := await stored_completions.resume(service, asked)) is not None:
        return resumed
    chat = service.chat_format(tokenizer)
    params = message_requests.sampling_params(
        asked, engine.sampling_defaults, requests.header_timeout(), reasons=chat.reasons
    )
    use, prompt = await _prompt(service, asked)
    how = read_as(use, message_requests.read_format(asked, chat), tokenizer, prompt)
    params = constrained(params, use.structured_outputs(chat.calls), how)
    room = max(1, info.context_len - len(prompt))
    params = replace(params, max_tokens=min(asked.max_tokens, room), max_new_tokens=None, lora=lora)
    head = AnswerHead(f"msg_{g.request_id}", lora or engine.model_name)
    try:
        if stored_completions.is_stored(service, asked):
            return await stored_completions.answer(service, asked, head.id, [Prompt(prompt)], params)
        return await _answer(service, asked, head, prompt, params, how)
    except InvalidParameter as error:
        raise message_requests.renamed(error) from None


async def _answer(
    service: Service,
    asked: MessagesRequest,
    head: AnswerHead,
    prompt: list[int],
    params: SamplingParams,
    how: Reading,
) -> Response:
    submission = Submission(
        head.id,
        [prompt],
        params,
        g.arrived,
        prompt_field="messages",
        client=g.client,
        session=requests.header_session(),
    )
    answer = MessageAnswer(
        head,
        prompt_tokens=len(prompt),
        max_tokens=asked.max_tokens,
        reading=how,
        show_thinking=message_requests.shows_thinking(asked),
    )
    outputs = service.outputs(submission)
    if asked.stream:
        return await service.stream(outputs, answer, ANTHROPIC)
    return await service.whole(outputs, answer)


async def count_tokens(service: Service, asked: CountTokensRequest) -> Response:
    """Count the tokens of the prompt that a conversation becomes."""
    requests.check_model(service.engine, asked.model)
    _, prompt = await _prompt(service, asked)
    g.common_headers |= {"request-id": g.request_id}
    return json_response(TokenCount(input_tokens=len(prompt)))


async def _prompt(service: Service, asked: CountTokensRequest) -> tuple[ToolUse, list[int]]:
    _, tokenizer = requests.loaded(service.engine)
    turns, use = message_requests.template_turns(asked), message_requests.tool_use(asked)
    continued = message_requests.goes_on(asked)
    rendering = {"continue_final_message": True} if continued else {}
    try:
        prompt = await requests.encode_turns(
            tokenizer,
            turns,
            use.tools,
            message_requests.template_kwargs(asked),
            add_generation_prompt=not continued,
            rendering=rendering,
        )
    except InvalidParameter as error:
        error.rename_field("continue_final_message", "messages")
        raise
    return use, prompt
