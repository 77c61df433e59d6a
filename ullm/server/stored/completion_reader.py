"""Reads a stored chat, completion or message, as a stream of events from any of them on, or as a whole.

The events are a function of the tokens: each token makes its events alone, and choices come in turns, a token
of each. So an event's number, its place in the stream, is the same whenever it is made, and by whom.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import trio

from ullm.engine.replay import ChoiceReplay
from ullm.server.api.answers import AnswerFormat
from ullm.server.api.errors import AnswerInterrupted
from ullm.server.api.types import TokenizerInterface
from ullm.server.stored.completion import StoredCompletion

TOKENS_AT_ONCE = 64
"""Tokens that are made into events before other tasks have a turn."""


class CompletionReader:
    """The events of an answer as they come; see `ullm.server.http.sse.TimedSource`.

    Args:
        form: makes the events; must be new.
        after: number of the last event that the client has; -1: it has none.
    """

    def __init__(
        self, answer: StoredCompletion, form: AnswerFormat, tokenizer: TokenizerInterface, after: int = -1
    ) -> None:
        self._answer = answer
        self._form = form
        self._after = after
        self._number = -1
        self._over = False
        head = answer.head
        n = head.params.n
        self._replays = [
            ChoiceReplay(choice % n, head.prompts[choice // n], head.params, tokenizer)
            for choice in range(answer.num_choices)
        ]
        self._unfinished = list(range(answer.num_choices))

    async def next(self, deadline: float) -> bytes | None:
        """Return the events that are new, or None if there are none before ``deadline``.

        Raises:
            StopAsyncIteration: there will be no more.
        """
        while True:
            if self._over:
                raise StopAsyncIteration
            before = self._number
            if events := await self._events():
                return events
            if self._over or self._number != before:  # the client has them
                await trio.lowlevel.checkpoint()
                continue
            with trio.move_on_at(deadline) as scope:
                await self._answer.wait_changed()
            if scope.cancelled_caught:
                return None

    async def whole(self) -> msgspec.Struct:
        """Return the body of the whole answer, which has ended."""
        while await self._turn(whole=True) is not None:
            await trio.lowlevel.checkpoint()
        return self._form.whole(self._answer.usage())

    async def _events(self) -> bytes:
        data: list[bytes] = []
        turns = 0
        while turns < TOKENS_AT_ONCE and (events := await self._turn()) is not None:
            turns += 1
            data += list(self._numbered(events))
        if turns < TOKENS_AT_ONCE and self._answer.end is not None:
            self._over = True
            data += list(self._numbered(self._last()))
        elif turns < TOKENS_AT_ONCE and self._answer.interrupted:
            self._over = True
            head = self._answer.head
            data.append(head.last_events(head.failure(AnswerInterrupted())))
        return b"".join(data)

    def _numbered(self, events: bytes) -> Iterator[bytes]:
        for event in events.split(b"\n\n")[:-1]:
            self._number += 1
            if self._number > self._after:
                yield b"id: %s:%d\n%s\n\n" % (self._answer.head.id.encode(), self._number, event)

    def _last(self) -> bytes:
        end = self._answer.end
        if end is not None and end.failure is not None:
            return self._answer.head.last_events(end.failure)
        return self._form.end(self._answer.usage())

    async def _turn(self, *, whole: bool = False) -> bytes | None:
        """Read one token, or the end of a choice; return its events, or None if it is not there yet."""
        choice = self._whose_turn()
        if choice is None:
            return None
        answer, replay = self._answer, self._replays[choice]
        tokens, end = answer.tokens[choice], answer.ends[choice]
        place = replay.num_tokens
        last = place >= len(tokens) - (end is not None and end.with_token)
        prompt = choice // answer.head.params.n
        scores = answer.scores[choice] if answer.scored else None
        replay.num_cached_tokens = answer.cached.get(prompt, 0)
        if end is not None and last:
            output = replay.end(tokens[place:], end, scores and scores[place:])
            self._unfinished.remove(choice)
        else:
            output = replay.token(tokens[place], scores and scores[place : place + 1])
        await self._form.prepare(prompt, output)
        if whole:
            self._form.add(prompt, output)
            return b""
        return self._form.events(prompt, output)

    def _whose_turn(self) -> int | None:
        """Return the choice that has been read least far, if there is something to read of it."""
        answer = self._answer
        waiting = self._unfinished
        if answer.end is not None:  # after a failure, what there is
            waiting = [each for each in waiting if self._readable(each)]
        choice = min(waiting, key=lambda each: (self._replays[each].num_tokens, each), default=None)
        return choice if choice is not None and self._readable(choice) else None

    def _readable(self, choice: int) -> bool:
        answer = self._answer
        return answer.ends[choice] is not None or self._replays[choice].num_tokens < answer.num_readable(
            choice
        )
