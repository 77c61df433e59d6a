"""The service behind one app, which every handler gets: the engine, and what handlers share."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import msgspec
from quart import Response, g

from ullm.config import ServerConfig
from ullm.parsing.formats import ChatFormat
from ullm.server.access_log import note_outputs
from ullm.server.api.answers import AnswerFormat
from ullm.server.api.openapi import openapi_document
from ullm.server.api.refusals import UnknownFields
from ullm.server.api.responses import json_response
from ullm.server.api.route import Route
from ullm.server.api.types import EngineInterface, TokenizerInterface
from ullm.server.http.pacing import Pacer, unhurried
from ullm.server.http.quart_connection import current_wire, sent
from ullm.server.http.sse import OPENAI, Dialect, EventStream, open_event_stream
from ullm.server.large_body import LargeBodies
from ullm.server.metrics import Metrics
from ullm.server.routes.outputs import Outputs, Submission
from ullm.server.stored.answers import Answers

Shutdown = Callable[[float | None], object]
"""Begins the stop of the engine, given the seconds until everything has ended."""


@dataclass(frozen=True)
class Service:
    """The engine, the metrics and the settings of one app.

    Args:
        routes: the app's routes.
        shutdown: carries out ``POST /admin/shutdown``.
        stored: the stored answers; None for an app that has none.
        created: time of the app's creation, in seconds since 1970.
    """

    engine: EngineInterface
    config: ServerConfig
    metrics: Metrics
    routes: tuple[Route, ...]
    shutdown: Shutdown
    stored: Answers | None
    pacer: Pacer = field(default_factory=Pacer)
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def unknown_fields(self) -> UnknownFields:
        """What happens to fields of requests that nobody knows."""
        return UnknownFields(strict=self.config.strict_fields)

    @cached_property
    def large_bodies(self) -> LargeBodies:
        """Parses bodies that would hold the event loop."""
        return LargeBodies(self.config)

    def chat_format(self, tokenizer: TokenizerInterface) -> ChatFormat:
        """Return how the model's answers are read: by its chat template, or as the configuration says."""
        found, config = tokenizer.chat_format, self.config
        if config.tool_call_parser != "auto":
            found = replace(found, calls=config.tool_call_parser)
        if config.reasoning_parser != "auto":
            found = replace(found, reasons=config.reasoning_parser == "think")
        return found

    @property
    def answers(self) -> Answers:
        """The stored answers."""
        assert self.stored is not None, "the routes that need them are in apps that have them"
        return self.stored

    @cached_property
    def document(self) -> bytes:
        """The OpenAPI document, built when it is first asked for."""
        return msgspec.json.encode(openapi_document(self.routes, secured=bool(self.config.api_keys)))

    def outputs(self, submission: Submission) -> Outputs:
        """Return the outputs of a submission; they are to be opened."""
        outputs = Outputs(self.engine, self.metrics, submission)
        note_outputs(outputs)
        return outputs

    @asynccontextmanager
    async def event_stream(self, dialect: Dialect = OPENAI) -> AsyncIterator[EventStream]:
        """Open the event stream that answers the current request; see `open_event_stream`."""
        wire, keep_alive = current_wire(), self.config.sse_keep_alive
        async with open_event_stream(wire, g.common_headers, keep_alive, dialect) as stream:
            with self.pacer.stream():
                yield stream

    async def stream(self, outputs: Outputs, answer: AnswerFormat, dialect: Dialect = OPENAI) -> Response:
        """Write the answer's events as the outputs come, paced by the number of streams."""
        async with self.event_stream(dialect) as stream, outputs.open(self.pacer.interval):
            async for prompt, output in stream.each(outputs):
                await answer.prepare(prompt, output)
                events = answer.events(prompt, output)
                if events:
                    await stream.write(events)
            await stream.write(answer.end(outputs.usage()))
        return sent()

    async def whole(self, outputs: Outputs, answer: AnswerFormat) -> Response:
        """Wait for all outputs and return the answer in one piece."""
        async with outputs.open(unhurried):
            async for prompt, output in outputs:
                await answer.prepare(prompt, output)
                answer.add(prompt, output)
        return json_response(answer.whole(outputs.usage()))
