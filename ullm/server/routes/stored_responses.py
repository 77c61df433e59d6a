"""``/v1/responses``: answers that are stored, and may be made in the background."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import trio
from quart import Response, g, request

from ullm.config import ServerConfig
from ullm.errors import InvalidParameter
from ullm.parsing.tool_use import ToolUse, constrained, read_as, use_of
from ullm.sampling import MAX_SEED
from ullm.server.api import requests
from ullm.server.api.errors import AnswerInterrupted
from ullm.server.api.response_objects import DeletedResponse, InputItems
from ullm.server.api.response_requests import (
    ResponsesRequest,
    input_messages,
    renamed,
    requested_tools,
    sampling_params,
    template_kwargs,
)
from ullm.server.api.responses import json_response
from ullm.server.api.schemas import Message
from ullm.server.api.tool_use import as_dicts
from ullm.server.http.quart_connection import sent
from ullm.server.routes.outputs import Submission
from ullm.server.routes.resuming import event_number, wants_stream
from ullm.server.routes.service import Service
from ullm.server.stored.answer import AnswerHead, StoredAnswer
from ullm.server.stored.reader import AnswerReader


def is_kept(config: ServerConfig, asked: ResponsesRequest) -> bool:
    """Return whether a request needs the stored answers."""
    return asked.store is not False or asked.previous_response_id is not None


async def create(service: Service, asked: ResponsesRequest) -> Response:
    """Begin a response; answer with all of it, with its events, or at once if it is in the background."""
    if asked.background and asked.store is False:
        raise InvalidParameter("background needs store: the answer is fetched later", "background")
    asked = service.answers.as_kept(asked)
    answer = StoredAnswer(await _head(service, asked))
    prepare(service, answer)
    if asked.store is not False:
        await service.answers.keep(answer)
    if asked.background or service.answers.survives(answer):
        service.answers.start(answer)
        if asked.stream:
            return await _stream(service, answer)
        return json_response(answer.show()) if asked.background else await _whole(answer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.answers.make, answer)
        if asked.stream:
            response = await _stream(service, answer)
            nursery.cancel_scope.cancel()  # has ended, unless this process stops
            return response
    return await _whole(answer)


async def _whole(answer: StoredAnswer) -> Response:
    """Wait for the end of an answer and show it."""
    while not answer.ended:
        if answer.interrupted:
            raise AnswerInterrupted
        await answer.wait_changed()
    if isinstance(answer.failure, InvalidParameter):
        raise renamed(answer.failure, answer.head.request)
    if answer.failure is not None:
        raise answer.failure
    return json_response(answer.show())


async def _head(service: Service, asked: ResponsesRequest) -> AnswerHead:
    engine = service.engine
    _, tokenizer = requests.loaded(engine)
    lora = requests.check_model(engine, asked.model)
    params = sampling_params(asked, engine.sampling_defaults, secrets.randbelow(MAX_SEED))
    params = replace(params, lora=lora, timeout=requests.header_timeout())
    messages = [Message(role="system", content=asked.instructions)] if asked.instructions else []
    turns = requests.template_messages([*messages, *input_messages(asked)])
    if asked.previous_response_id is not None:
        earlier = await service.answers.find(asked.previous_response_id, g.owner, StoredAnswer)
        turns = [*turns[: len(messages)], *earlier.conversation(), *turns[len(messages) :]]
    use = _tool_use(asked)
    prompt = await requests.encode_turns(tokenizer, turns, use.tools, template_kwargs(asked))
    chat = service.chat_format(tokenizer)
    how = read_as(use, chat, tokenizer, prompt)
    params = constrained(params, use.structured_outputs(chat.calls), how)
    return AnswerHead(
        id=f"resp_{secrets.token_hex(16)}",
        owner=g.owner,
        created=int(time.time()),
        served=service.answers.served(lora),
        model=lora or engine.model_name,
        request=asked,
        messages=turns[len(messages) :],
        prompt=prompt,
        params=params,
        session=requests.header_session(),
    )


async def show(service: Service, id: str) -> Response:
    """Show a response, or its events from one of them on, as they come."""
    answer = await service.answers.find(id, g.owner, StoredAnswer)
    if wants_stream():
        return await _stream(service, answer, event_number())
    return json_response(answer.show())


async def cancel(service: Service, id: str) -> Response:
    """Cancel a response that is made in the background; one that has ended stays as it is."""
    answer = await service.answers.find(id, g.owner, StoredAnswer)
    if not answer.head.request.background:
        raise InvalidParameter("only a response in the background can be cancelled", "id")
    answer.scope.cancel()
    while answer.end is None:
        await answer.wait_changed()
    return json_response(answer.show())


async def delete(service: Service, id: str) -> Response:
    """Forget a response; one that is being made is cancelled."""
    await service.answers.remove(await service.answers.find(id, g.owner, StoredAnswer))
    return json_response(DeletedResponse(id=id))


async def input_items(service: Service, id: str) -> Response:
    """Show what a response was asked with; its query may ask for a page, by OpenAI's parameters."""
    answer = await service.answers.find(id, g.owner, StoredAnswer)
    given = answer.head.request.input
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    items = [{"id": f"msg_{id.removeprefix('resp_')}_in{index}", **item} for index, item in enumerate(given)]
    page, more = _page(items)
    ids = [item["id"] for item in page]
    return json_response(
        InputItems(
            data=page, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=more
        )
    )


def _page(items: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """Return the page that the query asks for, and whether there is more after it; by default all."""
    order, after, limit = (request.args.get(name) for name in ("order", "after", "limit"))
    if order not in (None, "asc", "desc"):
        raise InvalidParameter(f"order must be asc or desc, got {order!r}", "order")
    if order == "desc":
        items = items[::-1]
    if after is not None:
        places = [index for index, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidParameter(f"after must be the id of an item, got {after!r}", "after")
        items = items[places[0] + 1 :]
    if limit is None:
        return items, False
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= 100):
        raise InvalidParameter(f"limit must be a whole number from 1 to 100, got {limit!r}", "limit")
    return items[: int(limit)], len(items) > int(limit)


async def _stream(service: Service, answer: StoredAnswer, after: int = -1) -> Response:
    _, tokenizer = requests.loaded(service.engine)
    async with service.event_stream() as stream:
        async for events in stream.each(AnswerReader(answer, tokenizer, after)):
            await stream.write(events)
    return sent()


async def make(service: Service, answer: StoredAnswer, note: Callable[[], None]) -> str:
    """Have the engine make an answer, or go on with it; return how it ended."""
    head, known, reason = answer.head, 0, "cancelled"
    submission = Submission(
        head.id,
        [head.prompt],
        head.params,
        trio.current_time(),
        "input",
        tuple(answer.token_ids),
        client=f"key {head.owner}" if head.owner else "stored answers",
        limit_field="max_output_tokens",
        session=head.session,
    )
    async with service.outputs(submission).open(service.pacer.interval) as outputs:
        async for _, output in outputs:
            known = answer.take(output, known)
            reason = output.finish_reason or reason
            note()
    return reason


def _tool_use(asked: ResponsesRequest) -> ToolUse:
    tools, parallel = as_dicts(requested_tools(asked)), asked.parallel_tool_calls is not False
    return use_of(tools, asked.tool_choice, parallel=parallel)


def prepare(service: Service, answer: StoredAnswer) -> None:
    """Say how an answer is read, the same after a restart."""
    info, tokenizer = requests.loaded(service.engine)
    use, chat = _tool_use(answer.head.request), service.chat_format(tokenizer)
    answer.tokenizer = tokenizer
    answer.reading = read_as(use, chat, tokenizer, answer.head.prompt)
    answer.end_token_ids = frozenset(info.eos_token_ids)
