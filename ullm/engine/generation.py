"""A request as its reader sees it: text and tokens as they come, for each of its choices."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

import trio

from ullm.engine.output import Choice, Output
from ullm.errors import InvalidParameter, PromptTooLong
from ullm.protocol.messages import ModelInfo, TokenLogprobs
from ullm.sampling import MAX_SEED, SamplingParams
from ullm.scheduling.request import RequestRecord
from ullm.tokenization.detokenizer import TextAssembler

if TYPE_CHECKING:
    from ullm.actors.router import Router
    from ullm.actors.tokenizer import TokenizerActor


class Readers:
    """Counts the generations that are entered and not yet left: who must still get something."""

    def __init__(self) -> None:
        self._count = 0
        self._none = trio.Event()

    def enter(self) -> None:
        """One more."""
        if not self._count:
            self._none = trio.Event()
        self._count += 1

    def leave(self) -> None:
        """One less."""
        self._count -= 1
        if not self._count:
            self._none.set()

    async def wait_none(self) -> None:
        """Wait until there are none."""
        while self._count:
            await self._none.wait()


class Generation:
    """One request: an async context manager that is also an async iterator of `Output`.

    Entering admits the request; leaving before the end aborts it. With ``n`` above 1, the outputs of
    the choices come interleaved, each with its ``index``.

    Args:
        prompt: text, or token ids.

    Attributes:
        pace: if set, called after outputs were read: seconds for which further tokens wait, to be read
            together. What ends a choice never waits, nor do tokens that a stop string may be in.

    Raises:
        InvalidParameter: on entering, for token ids outside the vocabulary, or an empty prompt.
        PromptTooLong: on entering.
        QueueFull: on entering.
        RequestPoisoned, EngineDead: while iterating.
    """

    def __init__(
        self,
        router: Router,
        readers: Readers,
        tokenizer: TokenizerActor,
        info: ModelInfo,
        prompt: Sequence[int] | str,
        params: SamplingParams,
        request_id: str,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.prompt_token_ids: list[int] = []
        self.pace: Callable[[], float] | None = None
        self._router = router
        self._readers = readers
        self._tokenizer = tokenizer
        self._info = info
        self._prompt = prompt
        self._choices: list[Choice] = []
        self._turn = 0
        self._wake: trio.Event | None = None
        self._held_until = 0.0
        self._held_at_most = math.inf
        self._deadline = math.inf

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """One per prompt token once the first output is there, if asked for; the first has none."""
        found = self._choices[0].record.prompt_logprobs if self._choices else None
        return None if self.params.prompt_logprobs is None else [None, *(found or [])]

    async def __aenter__(self) -> Self:
        if self.params.timeout is not None:
            self._deadline = trio.current_time() + self.params.timeout
        prompt = self._prompt
        self.prompt_token_ids = (
            await self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        )
        self._check_tokens()
        max_total = self._max_total()
        self._router.check_room(self.params.n, self.params.n * max_total)
        self._readers.enter()
        first_seed = secrets.randbelow(MAX_SEED) if self.params.seed is None else self.params.seed
        for index in range(self.params.n):
            self._choices.append(self._submit(index, max_total, choice_seed(first_seed, index)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
        self._readers.leave()
        for choice in self._choices:
            choice.record.notify = _nobody_reads  # or it would take a collection of garbage to free them

    def abort(self) -> None:
        """End the request with what it has; its last outputs say ``finish_reason="abort"``."""
        for choice in self._choices:
            self._router.finish(choice.record.seq_id, "abort")

    def __aiter__(self) -> AsyncIterator[Output]:
        return self

    async def __anext__(self) -> Output:
        output = await self.next(math.inf)
        assert output is not None, "only a deadline ends the wait without an output"
        return output

    async def next(self, deadline: float) -> Output | None:
        """The next output, or None if none comes before ``deadline``, in trio's time.

        Raises:
            StopAsyncIteration: there will be none.
            RequestPoisoned, EngineDead: as the iteration does.
        """
        if not self._choices:
            raise RuntimeError("enter the generation first: async with engine.generate(…) as generation")
        while True:
            while (choice := self._changed()) is not None:
                output = self._advance(choice)
                if output is not None:
                    self._hold()
                    return output
            if all(choice.finished for choice in self._choices):
                raise StopAsyncIteration
            if await self._wait(deadline) and trio.current_time() >= deadline:
                return None

    def _changed(self) -> Choice | None:
        """A choice that has something to read now; they take turns."""
        count = len(self._choices)
        for number in range(self._turn, self._turn + count):
            choice = self._choices[number % count]
            if choice.has_news and (choice.record.done or not self._held()):
                self._turn = (number + 1) % count
                return choice
        return None

    def _held(self) -> bool:
        """Whether tokens still wait for others."""
        return self._held_until > 0.0 and trio.current_time() < self._held_until

    def _advance(self, choice: Choice) -> Output | None:
        if choice.record.error is not None:
            choice.finished = True
            raise choice.record.error
        output, stop = choice.next()
        if stop is not None:
            self._router.finish(choice.record.seq_id, "stop")
        return output

    def _hold(self) -> None:
        """What comes from now on waits a while, unless something else can be read already."""
        if self.pace is None or self.params.stop_strings or self._changed() is not None:
            return
        seconds = self.pace()
        if seconds > 0:
            now = trio.current_time()
            self._held_until, self._held_at_most = now + seconds, now + 2 * seconds
            for choice in self._choices:
                choice.record.quiet_until = self._held_until

    async def _wait(self, deadline: float) -> bool:
        """Wait for something to read; whether a time was over first, the reader's or the request's."""
        self._wake = wake = trio.Event()
        until = min(deadline, self._deadline, self._held_at_most)
        with trio.CancelScope(deadline=until) as waiting:
            await wake.wait()
        self._wake = None
        if not waiting.cancelled_caught:
            return False
        now = trio.current_time()
        if now >= self._held_at_most:  # no further token has come since
            self._held_at_most = math.inf
        if now >= self._deadline:
            self._deadline = math.inf
            for choice in self._choices:
                self._router.finish(choice.record.seq_id, "timeout")
        return True

    def _submit(self, index: int, max_total: int, seed: int) -> Choice:
        first = index == 0
        params = replace(
            self.params, n=1, seed=seed, prompt_logprobs=self.params.prompt_logprobs if first else None
        )
        arrival = self._router.arrival()
        record = RequestRecord(
            seq_id=arrival,
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            params=params,
            max_total=max_total,
            arrival=arrival,
            notify=self._notify,
        )
        decoder = self._tokenizer.detokenizer(
            prompt_token_ids=self.prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        text = TextAssembler(
            decoder,
            params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )
        self._router.submit(record)
        return Choice(index, record, text)

    def _notify(self) -> None:
        if self._wake is not None:
            self._wake.set()

    def _check_tokens(self) -> None:
        vocab_size = self._info.vocab_size
        if not self.prompt_token_ids:
            raise InvalidParameter("the prompt is empty; it must have at least one token", "prompt")
        for name, token_ids in (
            ("prompt", self.prompt_token_ids),
            ("stop_token_ids", self.params.stop_token_ids),
            ("logit_bias", self.params.logit_bias),
        ):
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise InvalidParameter(
                        f"{name}: token id {token_id} is not in the model's vocabulary of {vocab_size}", name
                    )

    def _max_total(self) -> int:
        """Tokens of prompt and output at which each choice ends."""
        limit, length = self._info.context_len, len(self.prompt_token_ids)
        if length >= limit:
            raise PromptTooLong(length, limit)
        if self.params.max_tokens is None:
            return limit
        if length + self.params.max_tokens > limit:
            raise InvalidParameter(
                f"max_tokens is {self.params.max_tokens}, but the prompt has {length} tokens and the model's "
                f"context is {limit}: at most {limit - length} can be generated",
                "max_tokens",
            )
        return length + self.params.max_tokens


def _nobody_reads() -> None:
    """The reader of a record has left."""


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice ``index`` of ``n``; choice 0 has the request's own.

    Spread by the golden ratio (Knuth, TAOCP 3, 6.4) so that neighbouring requests' choices differ.
    """
    return (seed + index * 0x9E3779B97F4A7C15) % MAX_SEED
