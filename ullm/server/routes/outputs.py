"""The generations of one HTTP request: all their outputs in one stream, with usage and timings."""

from __future__ import annotations

import math
import secrets
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import trio

from ullm.errors import InvalidParameter, PromptTooLong
from ullm.protocol.messages import TokenLogprobs
from ullm.sampling import SamplingParams
from ullm.server.api.responses import PromptTokensDetails, Usage
from ullm.server.api.types import EngineInterface, GenerationInterface
from ullm.server.metrics import Metrics, RequestTimer

if TYPE_CHECKING:
    from ullm.engine.output import Output


@dataclass(frozen=True)
class Submission:
    """The prompts and parameters that one HTTP request submits to the engine.

    Args:
        request_id: the response's id; the engine's requests are numbered under it.
        arrived: trio time from which the request's timeout counts, encoding and queueing included.
        prompt_field: the field that the client put the prompt in, for errors.
        client: who sends it; see `ullm.server.access`.
        session: the session that it belongs to, if it names one.
        emitted: tokens of the answer, which goes on after them.
        limit_field: the field that the client put the limit of tokens in, for errors.
    """

    request_id: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    arrived: float
    prompt_field: str = "prompt"
    emitted: tuple[int, ...] = ()
    client: str = ""
    limit_field: str = "max_tokens"
    session: str = ""

    def params_from_now(self) -> SamplingParams:
        """Return the parameters with what is left of the timeout."""
        if self.params.timeout is None:
            return self.params
        left = self.arrived + self.params.timeout - trio.current_time()
        return replace(self.params, timeout=max(0.0, left))


class Outputs:
    """The outputs of a submission's prompts, in the order in which they come, within `open`.

    An async iterator of pairs: the number of a prompt, and what is new in one of its choices.
    """

    def __init__(self, engine: EngineInterface, metrics: Metrics, submission: Submission) -> None:
        self._engine = engine
        self._metrics = metrics
        self._submission = submission
        self._generations: list[GenerationInterface] = []
        self._cached_tokens: dict[int, int] = {}
        self._generated_tokens: dict[tuple[int, int], int] = {}

    @asynccontextmanager
    async def open(self, pace: Callable[[], float]) -> AsyncIterator[Outputs]:
        """Submit all prompts; leaving aborts what has not finished.

        Args:
            pace: returns the seconds between two outputs; see `ullm.engine.generation.Generation`.

        Raises:
            RequestError: the engine does not take the request, as in `EngineInterface.generate`.
        """
        self._timer = RequestTimer(self._metrics)
        async with AsyncExitStack() as stack:
            for generation in self._start(pace):
                self._generations.append(await self._enter(generation, stack))
                await trio.lowlevel.checkpoint()  # many long prompts take long
            if len(self._generations) == 1:
                self._next_before = _only(self._generations[0])
            else:
                self._next_before = await stack.enter_async_context(_merged(self._generations))
            yield self

    def _start(self, pace: Callable[[], float]) -> list[GenerationInterface]:
        params = self._submission.params_from_now()
        # Made unique, because clients may use an X-Request-Id twice.
        name = f"{self._submission.request_id}-{secrets.token_hex(4)}"
        return [
            self._engine.generate(
                prompt,
                params,
                request_id=f"{name}-{index}",
                pace=pace,
                client=self._submission.client,
                emitted=self._submission.emitted,
                session=self._submission.session,
            )
            for index, prompt in enumerate(self._submission.prompts)
        ]

    async def _enter(self, generation: GenerationInterface, stack: AsyncExitStack) -> GenerationInterface:
        try:
            return await stack.enter_async_context(generation)
        except (InvalidParameter, PromptTooLong) as error:
            if error.param == "prompt":
                error.param = self._submission.prompt_field
            error.rename_field("max_tokens", self._submission.limit_field)
            raise

    def __aiter__(self) -> Outputs:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        item = await self.next(math.inf)
        assert item is not None, "only a deadline ends the wait without an output"
        return item

    async def next(self, deadline: float) -> tuple[int, Output] | None:
        """Return the next output, or None if none comes before ``deadline``, in trio's time.

        Raises:
            StopAsyncIteration: nothing more will come.
        """
        try:
            item = await self._next_before(deadline)
        except StopAsyncIteration:
            usage = self.usage()
            self._timer.end(usage.prompt_tokens, usage.completion_tokens)
            raise
        if item is not None:
            self._count(*item)
        return item

    def _count(self, index: int, output: Output) -> None:
        self._cached_tokens.setdefault(index, output.num_cached_tokens)
        self._generated_tokens[index, output.index] = output.num_generated_tokens
        self._timer.note((index, output.index), len(output.token_ids))

    def usage(self) -> Usage:
        """Return the tokens so far; a prompt counts once, whatever ``n`` is."""
        prompt = sum(map(len, self._submission.prompts))
        completion = sum(self._generated_tokens.values())
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(sum(self._cached_tokens.values())),
        )

    def embedding(self, index: int) -> array[float]:
        """Return the pooled prompt, once its output has come; empty if it was not asked for."""
        return self._generations[index].embedding

    def prompt_logprobs(self, index: int) -> Sequence[TokenLogprobs | None] | None:
        """Return the log probabilities of a prompt's tokens, once its first output has come, if asked for."""
        return self._generations[index].prompt_logprobs


_Next = Callable[[float], Awaitable["tuple[int, Output] | None"]]


def _only(generation: GenerationInterface) -> _Next:
    """Return a function that waits for the outputs of the only prompt."""

    async def next_before(deadline: float) -> tuple[int, Output] | None:
        output = await generation.next(deadline)
        return None if output is None else (0, output)

    return next_before


@asynccontextmanager
async def _merged(generations: Sequence[GenerationInterface]) -> AsyncIterator[_Next]:
    """Yield a function that waits for the outputs of several prompts."""
    sender, receiver = trio.open_memory_channel[tuple[int, "Output"]](len(generations))

    async def pump(
        index: int, generation: GenerationInterface, into: trio.MemorySendChannel[tuple[int, Output]]
    ) -> None:
        with into:
            async for output in generation:
                await into.send((index, output))

    async def next_before(deadline: float) -> tuple[int, Output] | None:
        with trio.move_on_at(deadline):
            return await anext(receiver)
        return None

    with receiver:
        async with trio.open_nursery() as nursery:
            with sender:
                for index, generation in enumerate(generations):
                    nursery.start_soon(pump, index, generation, sender.clone())
            try:
                yield next_before
            finally:
                nursery.cancel_scope.cancel()
