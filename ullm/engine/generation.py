"""A request as its reader sees it: text and tokens of each of its choices, as they come."""

from __future__ import annotations

import math
import secrets
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

import trio

from ullm.engine.output import ChoiceReader, Output
from ullm.engine.readers import WakeUpCall
from ullm.errors import GrammarTooComplex, InvalidParameter, PromptTooLong
from ullm.grammars.thinking import ThinkingTokens
from ullm.parsing import reasoning
from ullm.parsing.tool_use import ends_in_reasoning
from ullm.protocol.messages import Adapter, TokenLogprobs
from ullm.sampling import MAX_SEED, SamplingParams, token_ids
from ullm.scheduling.block_pool import PromptHashes
from ullm.scheduling.request import RequestRecord
from ullm.tokenization.detokenizer import TextAssembler
from ullm.tokenization.stop_strings import StopString

if TYPE_CHECKING:
    from ullm.actors.tokenizer import TokenizerActor
    from ullm.engine.current_model import CurrentModel
    from ullm.engine.requests import Admits, OwnsRequests


class Generation:
    """One request: an async context manager that is also an async iterator of `Output`.

    Entering admits the request; leaving before the end aborts it. With ``n`` above 1, the outputs of
    the choices come interleaved, each with its ``index``.

    Args:
        prompt: text, or token ids.
        emitted: tokens that its only choice has already.
        pace: called after outputs were read; returns the seconds for which further tokens are held back,
            to be read together. The end of a choice is never held back, nor are tokens that a stop string
            may be in. None: every token is read at once.
        client, session: see `Engine.generate`.

    Attributes:
        prompt_token_ids: the prompt, once entered.

    Raises:
        ModelUnknown: on entering, if ``params.lora`` names no adapter.
        InvalidParameter: on entering, for token ids outside the vocabulary, an empty prompt, or a grammar
            that cannot be used.
        PromptTooLong: on entering.
        EngineNotReady, EngineDraining, EngineSleeping, EngineDead: on entering, if the engine takes no
            requests now.
        QueueFull, TooManyTokens: on entering, if it has no room now.
        RequestPoisoned, MigrationLimitReached, RequestTooLarge, GrammarTooComplex, EngineDead: while
            iterating.
    """

    def __init__(
        self,
        admission: Admits,
        router: OwnsRequests,
        current: CurrentModel,
        prompt: Sequence[int] | str,
        params: SamplingParams,
        request_id: str,
        pace: Callable[[], float] | None = None,
        client: str = "",
        emitted: Sequence[int] = (),
        session: str = "",
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.prompt_token_ids: list[int] = []
        self._pace = pace
        self._client = client
        self._session = session
        self._admission = admission
        self._router = router
        self._current = current
        self._prompt = prompt
        self._emitted = list(emitted)
        self._grammar = ""
        self._adapter: Adapter | None = None
        self._stop_tokens: dict[int, str] = {}
        self._hidden: dict[int, str] = {}
        self._stop = [StopString(text) for text in params.stop_strings]
        self._choices: list[ChoiceReader] = []
        self._turn = 0
        self._wake_up = WakeUpCall()
        self._held_at_most = math.inf
        self._deadline = math.inf

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """One per prompt token once the first output has come, if requested; the first token has none."""
        logprobs = self._choices[0].record.prompt_logprobs if self._choices else None
        return None if self.params.prompt_logprobs is None else [None, *(logprobs or [])]

    @property
    def embedding(self) -> array[float]:
        """The pooled prompt, once the only output has come, if it is pooled; empty otherwise."""
        return array("f", self._choices[0].record.embedding if self._choices else b"")

    async def __aenter__(self) -> Self:
        if self.params.timeout is not None:
            self._deadline = trio.current_time() + self.params.timeout
        info, tokenizer = self._current.loaded()
        self._adapter = self._current.adapters.find(self.params.lora)
        prompt = self._prompt
        if self.params.pooling and not info.pools:
            raise InvalidParameter(
                f"{info.architecture} has no hidden states that could be pooled", "pooling"
            )
        if isinstance(prompt, str):
            self.prompt_token_ids = await tokenizer.encode(prompt)
        else:
            if isinstance(prompt, list | tuple) and len(prompt) >= info.context_len:
                raise PromptTooLong(len(prompt), info.context_len)  # before millions are looked at
            self.prompt_token_ids = token_ids("prompt", prompt)
        if self.params.structured_outputs is not None:
            self._grammar = await tokenizer.compile_grammar(self.params.structured_outputs)
        if self.params.bad_words:
            found = await tokenizer.bad_words(self.params.bad_words)
            self.params = replace(self.params, bad_word_ids=(*self.params.bad_word_ids, *found))
        if self.params.thinking_token_budget is not None and self.params.thinking_tokens is None:
            self.params = replace(self.params, thinking_tokens=self._thinking_tokens(tokenizer))
        self._stop_tokens = {
            token: stop
            for stop in self.params.stop_strings
            if (token := tokenizer.special_token(stop)) is not None
        }
        if self.params.stop_strings and self.params.skip_special_tokens:
            self._hidden = tokenizer.special_tokens_in(self.params.stop_strings)
        choices = self._make_choices()  # of the model that is current now, after the encoding
        self._admission.admit([choice.record for choice in choices])
        self._choices = choices
        for choice in choices if self._emitted else ():
            self._end_if_complete(choice.record)
        return self

    def _thinking_tokens(self, tokenizer: TokenizerActor) -> ThinkingTokens:
        begin, end = tokenizer.token(reasoning.OPEN), tokenizer.token(reasoning.CLOSE)
        if end is None:
            raise InvalidParameter(
                f"thinking_token_budget: this model has no token {reasoning.CLOSE} to end its reasoning with",
                "thinking_token_budget",
            )
        begun = ends_in_reasoning(tokenizer, self.prompt_token_ids)
        return ThinkingTokens(-1 if begin is None else begin, end, begun)

    def _end_if_complete(self, record: RequestRecord) -> None:
        """End a request that had its last token already when it was taken up."""
        info, _ = self._current.loaded()
        ends = {
            *self.params.stop_token_ids,
            *self._stop_tokens,
            *(() if self.params.ignore_eos else info.eos_token_ids),
        }
        if self._emitted[-1] in ends and len(self._emitted) > self.params.min_tokens:
            self._router.finish(record.seq_id, "stop")
        elif len(record.prompt_token_ids) + len(self._emitted) >= record.max_total:
            self._router.finish(record.seq_id, "length")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
        self._admission.leave()

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
        """Return the next output, or None if none comes before ``deadline``, in trio's time.

        Raises:
            StopAsyncIteration: there are no more.
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

    def _changed(self) -> ChoiceReader | None:
        """Return a choice that has something to read now, taking turns; None if there is none."""
        count = len(self._choices)
        for number in range(self._turn, self._turn + count):
            choice = self._choices[number % count]
            if choice.has_news and (choice.record.done or not self._held()):
                self._turn = (number + 1) % count
                return choice
        return None

    def _held(self) -> bool:
        """Whether tokens are held back until there are more."""
        held_until = self._wake_up.quiet_until
        return held_until > 0.0 and trio.current_time() < held_until

    def _advance(self, choice: ChoiceReader) -> Output | None:
        if choice.record.error is not None:
            choice.finished = True
            error = choice.record.error
            if isinstance(error, GrammarTooComplex) and self.params.structured_outputs is not None:
                error.param = self.params.structured_outputs.param  # the router knows the grammar only
            raise error
        output, stop = choice.next()
        if stop is not None:
            self._router.finish(choice.record.seq_id, "stop")
        return output

    def _hold(self) -> None:
        """Hold back further tokens for a while, unless there is something else to read already."""
        if self._pace is None or self.params.stop_strings or self._changed() is not None:
            return
        seconds = self._pace()
        if seconds > 0:
            now = trio.current_time()
            self._wake_up.quiet_until, self._held_at_most = now + seconds, now + 2 * seconds

    async def _wait(self, deadline: float) -> bool:
        """Wait for something to read; return whether a deadline came first, the reader's or the request's."""
        if await self._wake_up.wait(min(deadline, self._deadline, self._held_at_most)):
            return False
        now = trio.current_time()
        if now >= self._held_at_most:  # no further token has come since
            self._held_at_most = math.inf
        if now >= self._deadline:
            self._deadline = math.inf
            for choice in self._choices:
                self._router.finish(choice.record.seq_id, "timeout")
        return True

    def _make_choices(self) -> list[ChoiceReader]:
        info, tokenizer = self._current.loaded()
        self._check_tokens(info.vocab_size)
        max_total = self._max_total(info.context_len)
        first_seed = secrets.randbelow(MAX_SEED) if self.params.seed is None else self.params.seed
        hashes = PromptHashes(self.prompt_token_ids)
        return [
            self._make_choice(index, max_total, choice_seed(first_seed, index), tokenizer, hashes)
            for index in range(self.params.n)
        ]

    def _make_choice(
        self, index: int, max_total: int, seed: int, tokenizer: TokenizerActor, hashes: PromptHashes
    ) -> ChoiceReader:
        params = self.params.choice(seed, scored=index == 0, stop_token_ids=self._stop_tokens)
        arrival = self._router.arrival()
        record = RequestRecord(
            seq_id=arrival,
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            params=params,
            max_total=max_total,
            arrival=arrival,
            notify=self._wake_up.notify,
            grammar=self._grammar,
            adapter=self._adapter,
            client=self._client,
            session=self._session,
            token_ids=list(self._emitted),
            prompt_hashes=hashes,
        )
        decoder = tokenizer.detokenizer(
            prompt_token_ids=self.prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        text = TextAssembler(
            decoder,
            self._stop,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            hidden=self._hidden,
        )
        return ChoiceReader(index, record, text, self._stop_tokens)

    def _check_tokens(self, vocab_size: int) -> None:
        if not self.prompt_token_ids:
            raise InvalidParameter("the prompt is empty; it must have at least one token", "prompt")
        for name, ids in (
            ("prompt", self.prompt_token_ids),
            ("stop_token_ids", self.params.stop_token_ids),
            ("logit_bias", self.params.logit_bias),
            ("allowed_token_ids", self.params.allowed_token_ids),
            ("bad_word_ids", [token for word in self.params.bad_word_ids for token in word]),
        ):
            worst = max(ids, default=0)
            if worst >= vocab_size:
                raise InvalidParameter(
                    f"{name}: token id {worst} is not in the model's vocabulary of {vocab_size}", name
                )

    def _max_total(self, limit: int) -> int:
        """Return the tokens of prompt and output together at which each choice ends.

        Args:
            limit: the model's context length.
        """
        length = len(self.prompt_token_ids)
        if length >= limit:
            raise PromptTooLong(length, limit)
        if self.params.max_tokens is None:
            default = self._current.sampling_defaults.max_tokens
            return limit if default is None else min(limit, length + max(default, self.params.min_tokens))
        if length + self.params.max_tokens > limit:
            raise InvalidParameter(
                f"max_tokens is {self.params.max_tokens}, but this model's maximum context length is {limit} "
                f"tokens and the prompt has {length}: at most {limit - length} can be generated",
                "max_tokens",
            )
        return length + self.params.max_tokens


def choice_seed(seed: int, index: int) -> int:
    """Return the seed of choice ``index``; choice 0 has the request's own.

    Spread by the golden ratio (Knuth, TAOCP 3, 6.4) so that neighbouring requests' choices differ.
    """
    return (seed + index * 0x9E3779B97F4A7C15) % MAX_SEED
