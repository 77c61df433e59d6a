"""Reads one stored answer as a stream of events, from any of them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import msgspec
import trio

from ullm.parsing.parts import CallArguments
from ullm.server.api.answers import error_event
from ullm.server.api.errors import AnswerInterrupted
from ullm.server.api.response_objects import EVENTS_PER_TOKEN, ItemEvents, event
from ullm.server.api.types import TokenizerInterface
from ullm.server.stored.answer import StoredAnswer
from ullm.server.stored.parts import AnswerParts, ScoredPart

_Numbered = tuple[int, str, dict[str, Any]]
_JOINED = frozenset(
    {
        "response.output_text.delta",
        "response.reasoning_text.delta",
        "response.function_call_arguments.delta",
    }
)
"""Events that become one where several come at once."""


class AnswerReader:
    """The events of an answer as they come; see `ullm.server.http.sse.TimedSource`.

    Args:
        after: number of the last event that the client has; -1: it has none.
    """

    def __init__(self, answer: StoredAnswer, tokenizer: TokenizerInterface, after: int = -1) -> None:
        self._answer = answer
        self._after = after
        self._opened = self._over = False
        self._read = 0
        self._items = ItemEvents(answer.head.id)
        self._parts = AnswerParts(answer.head.prompt, answer.head.params, answer.reading, tokenizer)

    async def next(self, deadline: float) -> bytes | None:
        """Return the events that are new, or None if there are none before ``deadline``.

        Raises:
            StopAsyncIteration: there will be no more.
        """
        while not (events := self._events()):
            if self._over:
                raise StopAsyncIteration
            with trio.move_on_at(deadline) as scope:
                await self._answer.wait_changed()
            if scope.cancelled_caught:
                return None
        return events

    def _events(self) -> bytes:
        if self._over:
            return b""
        new = [each for each in self._numbered() if each[0] > self._after]
        data = b"".join(event(kind, number, **fields) for number, kind, fields in _joined(new))
        if self._answer.interrupted and self._answer.end is None:
            self._over = True
            data += error_event(AnswerInterrupted())
        return data

    def _numbered(self) -> Iterator[_Numbered]:
        """Yield what is new, token by token, so that numbers do not depend on when somebody reads."""
        answer = self._answer
        if not self._opened:
            self._opened = True
            begun = msgspec.structs.replace(answer.show(), status="in_progress", output=[], usage=None)
            begun.error = begun.incomplete_details = None
            yield 0, "response.created", {"response": begun}
            yield 1, "response.in_progress", {"response": begun}
        while self._read < len(answer.token_ids):
            self._read += 1
            if self._read <= answer.num_shown:
                score = answer.scores[self._read - 1] if answer.scored else None
                parts = self._parts.push(answer.token_ids[self._read - 1], score)
                yield from self._changes(parts, self._numbers())
        if answer.end is not None:
            self._over = True
            numbers = self._numbers(1)
            yield from self._changes(self._parts.finish(), numbers)
            whole = answer.end.reason == "stop"
            for kind, fields in self._items.close("completed" if whole else "incomplete"):
                yield numbers(), kind, fields
            shown = answer.show()
            yield numbers(), f"response.{shown.status}", {"response": shown}

    def _numbers(self, later: int = 0) -> Callable[[], int]:
        """Return what numbers the events of the last token read; ``later``: those after it."""
        numbers = count((self._read + later) * EVENTS_PER_TOKEN)
        return lambda: next(numbers)

    def _changes(self, parts: Iterator[ScoredPart], number: Callable[[], int]) -> Iterator[_Numbered]:
        for part, logprobs in parts:
            if isinstance(part, CallArguments) and not part.text:
                continue
            for kind, fields in self._items.take(part, logprobs):
                yield number(), kind, msgspec.to_builtins(fields)


def _joined(events: list[_Numbered]) -> Iterator[_Numbered]:
    """Join deltas of the same item that follow each other; the last one's number counts."""
    held: _Numbered | None = None
    for each in events:
        number, kind, fields = each
        if (
            held is not None
            and kind in _JOINED
            and kind == held[1]
            and fields["item_id"] == held[2]["item_id"]
        ):
            joined: dict[str, Any] = {
                name: held[2][name] + fields[name] for name in ("delta", "logprobs") if name in fields
            }
            held = number, kind, {**fields, **joined}
            continue
        if held is not None:
            yield held
        held = each
    if held is not None:
        yield held
