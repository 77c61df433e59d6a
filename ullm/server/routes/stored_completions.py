"""Stored chats, completions and messages: with ``--journal`` they outlive connection and process."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import trio
from quart import Response, g

from ullm.config import ServerConfig
from ullm.engine.generation import choice_seed
from ullm.errors import InvalidParameter
from ullm.sampling import MAX_SEED, SamplingParams
from ullm.server.api import requests
from ullm.server.api.answers import AnswerStyle
from ullm.server.api.completion_answer import Prompt
from ullm.server.api.errors import AnswerInterrupted, AnswerUnknown
from ullm.server.api.message_objects import DeletedMessage
from ullm.server.api.message_requests import MessagesRequest
from ullm.server.api.responses import DeletedAnswer, json_response
from ullm.server.api.schemas import ChatCompletionRequest, CompletionRequest
from ullm.server.http.quart_connection import sent
from ullm.server.http.sse import ANTHROPIC, OPENAI
from ullm.server.routes.outputs import Submission
from ullm.server.routes.resuming import event_number, resumed_stream, wants_stream
from ullm.server.routes.service import Service
from ullm.server.routes.stored_forms import form_of
from ullm.server.stored.completion import CompletionHead, CompletionLike, StoredCompletion
from ullm.server.stored.completion_reader import CompletionReader


def is_stored(service: Service, asked: CompletionLike) -> bool:
    """Return whether an answer is to be stored: with ``--journal``, unless the client says no.

    Raises:
        InvalidParameter: the client wants it stored, and it cannot be.
    """
    if service.stored is None or service.config.journal is None:
        if asked.store:
            raise InvalidParameter("nothing is stored here; start the server with --journal", "store")
        return False
    return asked.store is not False


def is_kept(config: ServerConfig, asked: CompletionLike) -> bool:
    """Return whether a request is to begin, or to take up, an answer that is stored."""
    taken_up = asked.stream and resumed_stream() is not None
    return config.journal is not None and (asked.store is not False or bool(taken_up))


async def resume(service: Service, asked: CompletionLike) -> Response | None:
    """Go on with the stream that the header ``Last-Event-ID`` names; return None if it names none.

    Raises:
        AnswerUnknown: it is not there, or is not a stream of this route.
    """
    id = resumed_stream()
    if id is None or service.config.journal is None or not asked.stream:
        return None
    return await _stream(service, await _find(service, id, type(asked)), event_number(id))


async def answer(
    service: Service,
    asked: CompletionLike,
    id: str,
    prompts: list[Prompt],
    params: SamplingParams,
) -> Response:
    """Begin to make an answer in the background, and show it, streamed or whole."""
    await service.answers.recovered()  # so that no name is used twice
    head = CompletionHead(
        id=id if service.answers.is_free(id) else f"{id}-{secrets.token_hex(4)}",
        owner=g.owner,
        created=int(time.time()),
        served=service.answers.served(params.lora),
        model=params.lora or service.engine.model_name,
        client=g.client,
        chat=asked if isinstance(asked, ChatCompletionRequest) else None,
        completion=asked if isinstance(asked, CompletionRequest) else None,
        message=asked if isinstance(asked, MessagesRequest) else None,
        prompts=[prompt.token_ids for prompt in prompts],
        texts=[prompt.text for prompt in prompts],
        params=params if params.seed is not None else replace(params, seed=secrets.randbelow(MAX_SEED)),
        style=AnswerStyle()
        if isinstance(asked, MessagesRequest)
        else requests.answer_style(asked, service.config),
        limit_field=requests.token_limit(asked)[0],
        session=requests.header_session(),
    )
    stored = StoredCompletion(head)
    stored.arrived = g.arrived
    service.answers.add(stored)
    service.answers.start(stored)
    while not (stored.admitted or stored.ended):
        await stored.wait_changed()
    if stored.failure is not None and not stored.admitted:
        await service.answers.remove(stored)
        raise stored.failure
    return await (_stream(service, stored) if asked.stream else _whole(service, stored))


async def show_chat(service: Service, id: str) -> Response:
    """Show a chat's answer once it has ended, or its events from one of them on, as they come."""
    return await _show(service, await _find(service, id, ChatCompletionRequest))


async def show_completion(service: Service, id: str) -> Response:
    """Show a completion once it has ended, or its events from one of them on, as they come."""
    return await _show(service, await _find(service, id, CompletionRequest))


async def show_message(service: Service, id: str) -> Response:
    """Show a message once it has ended, or its events from one of them on, as they come."""
    return await _show(service, await _find(service, id, MessagesRequest))


async def delete_chat(service: Service, id: str) -> Response:
    """Forget a chat's answer; one that is being made is cancelled."""
    await service.answers.remove(await _find(service, id, ChatCompletionRequest))
    return json_response(DeletedAnswer(id=id, object="chat.completion.deleted"))


async def delete_completion(service: Service, id: str) -> Response:
    """Forget a completion; one that is being made is cancelled."""
    await service.answers.remove(await _find(service, id, CompletionRequest))
    return json_response(DeletedAnswer(id=id, object="text_completion.deleted"))


async def delete_message(service: Service, id: str) -> Response:
    """Forget a message; one that is being made is cancelled."""
    await service.answers.remove(await _find(service, id, MessagesRequest))
    return json_response(DeletedMessage(id=id))


async def _find(service: Service, id: str, kind: type) -> StoredCompletion:
    found = await service.answers.find(id, g.owner, StoredCompletion)
    if not isinstance(found.head.request, kind):
        raise AnswerUnknown(id)
    return found


async def _show(service: Service, stored: StoredCompletion) -> Response:
    if wants_stream():
        return await _stream(service, stored, event_number(stored.head.id))
    return await _whole(service, stored)


async def _stream(service: Service, stored: StoredCompletion, after: int = -1) -> Response:
    dialect = OPENAI if stored.head.message is None else ANTHROPIC
    async with service.event_stream(dialect) as stream:
        async for events in stream.each(_reader(service, stored, after)):
            await stream.write(events)
    return sent()


async def _whole(service: Service, stored: StoredCompletion) -> Response:
    while stored.end is None:
        if stored.interrupted:
            raise AnswerInterrupted
        await stored.wait_changed()
    if stored.failure is not None:
        raise stored.failure
    if (failure := stored.end.failure) is not None:
        return Response(failure.body, failure.status, content_type="application/json")
    return json_response(await _reader(service, stored).whole())


def _reader(service: Service, stored: StoredCompletion, after: int = -1) -> CompletionReader:
    _, tokenizer = requests.loaded(service.engine)
    return CompletionReader(stored, form_of(service, stored), tokenizer, after)


async def make(service: Service, stored: StoredCompletion, note: Callable[[], None]) -> str:
    """Have the engine make an answer, or go on with it; return how it ended."""
    if not stored.resumed:
        await _begin(service, stored, note)
    else:
        async with trio.open_nursery() as nursery:
            for choice in range(stored.num_choices):
                nursery.start_soon(partial(_go_on, service, stored, choice, note))
    return "stop" if all(stored.ends) else "abort"


async def _begin(service: Service, stored: StoredCompletion, note: Callable[[], None]) -> None:
    head = stored.head
    submission = _submission(head, head.prompts, head.params)
    if stored.arrived is not None:
        submission = replace(submission, arrived=stored.arrived)
    async with service.outputs(submission).open(service.pacer.interval) as outputs:
        await service.answers.keep(stored)  # what the engine refuses is not written
        stored.admit()
        async for prompt, output in outputs:
            scores = outputs.prompt_logprobs(prompt)
            stored.take(prompt * head.params.n + output.index, output, scores)
            note()


async def _go_on(service: Service, stored: StoredCompletion, choice: int, note: Callable[[], None]) -> None:
    head = stored.head
    prompt, index = divmod(choice, head.params.n)
    params = replace(head.params, n=1, seed=choice_seed(head.params.seed or 0, index))
    if index > 0 or prompt in stored.prompt_scores:
        params = replace(params, prompt_logprobs=None)
    submission = replace(
        _submission(head, [head.prompts[prompt]], params),
        emitted=tuple(stored.tokens[choice]),
    )
    async with service.outputs(submission).open(service.pacer.interval) as outputs:
        async for _, output in outputs:
            stored.take(choice, output, outputs.prompt_logprobs(0))
            note()


def _submission(head: CompletionHead, prompts: list[list[int]], params: SamplingParams) -> Submission:
    return Submission(
        head.id,
        prompts,
        params,
        trio.current_time(),
        prompt_field="messages" if head.completion is None else "prompt",
        client=head.client,
        limit_field=head.limit_field,
        session=head.session,
    )
