"""The service behind one app, which every handler gets: the engine, and what handlers share."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property

import msgspec
from quart import Response, g

from ullm.config import ServerConfig
from ullm.server.api.answers import AnswerFormat
from ullm.server.api.openapi import openapi_document
from ullm.server.api.responses import json_response
from ullm.server.api.route import Route
from ullm.server.api.types import EngineInterface
from ullm.server.http.pacing import Pacer, unhurried
from ullm.server.http.quart_connection import current_wire, sent
from ullm.server.http.sse import EventStream, open_event_stream
from ullm.server.metrics import Metrics
from ullm.server.routes.outputs import Outputs, Submission

Shutdown = Callable[[float | None], object]
"""Begins the stop of the engine, given the seconds until everything has ended."""


@dataclass(frozen=True)
class Service:
    """The engine, the metrics and the settings of one app.

    Args:
        routes: the app's routes.
        shutdown: carries out ``POST /admin/shutdown``.
        created: time of the app's creation, in seconds since 1970.
    """

    engine: EngineInterface
    config: ServerConfig
    metrics: Metrics
    routes: tuple[Route, ...]
    shutdown: Shutdown
    pacer: Pacer = field(default_factory=Pacer)
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def document(self) -> bytes:
        """The OpenAPI document, built when it is first asked for."""
        return msgspec.json.encode(openapi_document(self.routes, secured=bool(self.config.api_keys)))

    def outputs(self, submission: Submission) -> Outputs:
        """Return the outputs of a submission; they are to be opened."""
        return Outputs(self.engine, self.metrics, submission)

    @asynccontextmanager
    async def event_stream(self) -> AsyncIterator[EventStream]:
        """Open the event stream that answers the current request; see `open_event_stream`."""
        wire, keep_alive = current_wire(), self.config.sse_keep_alive
        async with open_event_stream(wire, g.common_headers, keep_alive) as stream:
            with self.pacer.stream():
                yield stream

    async def stream(self, outputs: Outputs, answer: AnswerFormat) -> Response:
        """Write the answer's events as the outputs come, paced by the number of streams."""
        async with self.event_stream() as stream, outputs.open(self.pacer.interval):
            async for prompt, output in stream.each(outputs):
                events = answer.events(prompt, output)
                if events:
                    await stream.write(events)
            await stream.write(answer.end(outputs.usage()))
        return sent()

    async def whole(self, outputs: Outputs, answer: AnswerFormat) -> Response:
        """Wait for all outputs and return the answer in one piece."""
        async with outputs.open(unhurried):
            async for prompt, output in outputs:
                answer.add(prompt, output)
        return json_response(answer.whole(outputs.usage()))
