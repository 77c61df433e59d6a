"""Has the stored answers of a service made, each by the route that it came by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ullm.server.routes import stored_completions, stored_responses
from ullm.server.routes.service import Service
from ullm.server.stored.answer import StoredAnswer
from ullm.server.stored.completion import StoredCompletion
from ullm.server.stored.stored import AnyStored


def serve_answers(service: Service) -> None:
    """Let the stored answers of a service go on."""
    service.answers.serve(partial(_make, service), partial(_prepare, service))


async def _make(service: Service, answer: AnyStored, note: Callable[[], None]) -> str:
    if isinstance(answer, StoredCompletion):
        return await stored_completions.make(service, answer, note)
    assert isinstance(answer, StoredAnswer), "there are two kinds"
    return await stored_responses.make(service, answer, note)


def _prepare(service: Service, answer: AnyStored) -> None:
    if isinstance(answer, StoredAnswer):
        stored_responses.prepare(service, answer)
