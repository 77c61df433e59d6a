"""What puts a stored chat, completion or message into the shape of its route."""

from __future__ import annotations

from ullm.parsing.tool_use import read_as
from ullm.server.api import message_requests, requests
from ullm.server.api.answers import AnswerFormat, AnswerHead
from ullm.server.api.chat_answer import ChatAnswer
from ullm.server.api.completion_answer import CompletionAnswer, Prompt
from ullm.server.api.logprobs import TokenIdNames
from ullm.server.api.message_answer import MessageAnswer
from ullm.server.api.message_requests import MessagesRequest
from ullm.server.api.schemas import ChatCompletionRequest, CompletionRequest
from ullm.server.api.tool_use import tool_use
from ullm.server.routes.service import Service
from ullm.server.stored.completion import StoredCompletion


def form_of(service: Service, stored: StoredCompletion) -> AnswerFormat:
    """Return a new form of an answer, the same whenever it is made."""
    asked = stored.head.request
    if isinstance(asked, ChatCompletionRequest):
        return _chat(service, stored, asked)
    if isinstance(asked, CompletionRequest):
        return _completion(service, stored, asked)
    return _message(service, stored, asked)


def _chat(service: Service, stored: StoredCompletion, asked: ChatCompletionRequest) -> ChatAnswer:
    head, (_, tokenizer) = stored.head, requests.loaded(service.engine)
    return ChatAnswer(
        AnswerHead(head.id, head.model, head.created),
        TokenIdNames(tokenizer) if asked.return_tokens_as_token_ids else tokenizer,
        head.params.n,
        stored.prompt_scores.get,
        head.style,
        prompt=head.prompts[0],
        begin=requests.echoed(asked),
        reading=read_as(tool_use(asked), service.chat_format(tokenizer), tokenizer, head.prompts[0]),
        call_ids=head.id,
        reasoning=asked.include_reasoning is not False,
    )


def _completion(service: Service, stored: StoredCompletion, asked: CompletionRequest) -> CompletionAnswer:
    head, (_, tokenizer) = stored.head, requests.loaded(service.engine)
    return CompletionAnswer(
        AnswerHead(head.id, head.model, head.created),
        asked,
        [Prompt(tokens, text) for tokens, text in zip(head.prompts, head.texts, strict=True)],
        tokenizer,
        stored.prompt_scores.get,
        head.style,
        only_echo=bool(asked.echo) and requests.token_limit(asked)[1] == 0,
    )


def _message(service: Service, stored: StoredCompletion, asked: MessagesRequest) -> MessageAnswer:
    head, (_, tokenizer) = stored.head, requests.loaded(service.engine)
    chat = message_requests.read_format(asked, service.chat_format(tokenizer))
    return MessageAnswer(
        AnswerHead(head.id, head.model, head.created),
        prompt_tokens=len(head.prompts[0]),
        max_tokens=asked.max_tokens,
        reading=read_as(message_requests.tool_use(asked), chat, tokenizer, head.prompts[0]),
        show_thinking=message_requests.shows_thinking(asked),
        call_ids=head.id,
    )
