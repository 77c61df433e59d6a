"""Running one HTTP request's generations: all their outputs, in one stream, with usage and timings."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import trio

from ullm.errors import PromptTooLong
from ullm.sampling import SamplingParams
from ullm.server.api.responses import PromptTokensDetails, Usage
from ullm.server.api.types import Engine, Generation
from ullm.server.http.pacing import unhurried
from ullm.server.metrics import Metrics, RequestTimer

if TYPE_CHECKING:
    from ullm.engine.output import Output


class Outputs(Protocol):
    """What comes of all prompts of a request, in the order in which it comes."""

    def __aiter__(self) -> Outputs:
        """Itself."""

    async def __anext__(self) -> tuple[int, Output]:
        """The index of a prompt, and what is new in one of its choices."""

    async def next(self, deadline: float) -> tuple[int, Output] | None:
        """The same, or None if nothing comes before ``deadline``, in trio's time.

        Raises:
            StopAsyncIteration: nothing more will come.
        """


_Next = Callable[[float], Awaitable["tuple[int, Output] | None"]]


@dataclass
class Job:
    """One HTTP request to generate: its prompts, and what has come of them.

    Args:
        request_id: the response's id; the engine's requests are numbered under it.
        prompt_field: where the client put the prompt, for errors.
        arrived: trio time from which the request's timeout counts, encoding and queueing included.
        pace: seconds between outputs; default: for an answer in one piece.
        generated_tokens: per prompt and choice.
    """

    engine: Engine
    metrics: Metrics
    request_id: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    arrived: float
    prompt_field: str = "prompt"
    pace: Callable[[], float] = unhurried
    generations: list[Generation] = field(default_factory=list)
    cached_tokens: dict[int, int] = field(default_factory=dict)
    generated_tokens: dict[tuple[int, int], int] = field(default_factory=dict)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Outputs]:
        """Admit all prompts, then yield ``(prompt, output)`` as they come; leaving aborts the rest."""
        timer = RequestTimer(self.metrics)
        params = self._params_from_now()
        unique = secrets.token_hex(4)  # clients may use one X-Request-Id twice
        async with AsyncExitStack() as stack:
            for index, prompt in enumerate(self.prompts):
                engine_id = f"{self.request_id}-{unique}-{index}"
                generation = self.engine.generate(prompt, params, request_id=engine_id)
                generation.pace = self.pace
                try:
                    self.generations.append(await stack.enter_async_context(generation))
                except PromptTooLong as error:
                    error.param = self.prompt_field
                    raise
            if len(self.generations) == 1:
                yield _Noted(self, timer, _only(self.generations[0]))
            else:
                yield _Noted(self, timer, await stack.enter_async_context(_merged(self.generations)))

    def _params_from_now(self) -> SamplingParams:
        """With what is left of the timeout."""
        if self.params.timeout is None:
            return self.params
        left = self.arrived + self.params.timeout - trio.current_time()
        return replace(self.params, timeout=max(0.0, left))

    def usage(self, completion_tokens: int | None = None) -> Usage:
        """Tokens so far; ``completion_tokens`` replaces the generated ones."""
        prompt = sum(map(len, self.prompts))
        completion = sum(self.generated_tokens.values()) if completion_tokens is None else completion_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(sum(self.cached_tokens.values())),
        )


class _Noted:
    """Outputs on their way to the client, with what usage and metrics need taken down.

    No generator, which would have to be closed.

    Args:
        next_before: see `Outputs.next`.
    """

    def __init__(self, job: Job, timer: RequestTimer, next_before: _Next) -> None:
        self._job, self._timer, self._next = job, timer, next_before

    def __aiter__(self) -> Outputs:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        found = await self.next(math.inf)
        assert found is not None, "only a deadline ends the wait without an output"
        return found

    async def next(self, deadline: float) -> tuple[int, Output] | None:
        job = self._job
        try:
            found = await self._next(deadline)
        except StopAsyncIteration:
            self._timer.end(sum(map(len, job.prompts)), sum(job.generated_tokens.values()))
            raise
        if found is not None:
            index, output = found
            job.cached_tokens.setdefault(index, output.num_cached_tokens)
            job.generated_tokens[index, output.index] = output.num_generated_tokens
            self._timer.note((index, output.index), len(output.token_ids))
        return found


def _only(generation: Generation) -> _Next:
    """The outputs of the only prompt."""

    async def next_before(deadline: float) -> tuple[int, Output] | None:
        output = await generation.next(deadline)
        return None if output is None else (0, output)

    return next_before


@asynccontextmanager
async def _merged(generations: Sequence[Generation]) -> AsyncIterator[_Next]:
    sender, receiver = trio.open_memory_channel[tuple[int, "Output"]](len(generations))

    async def pump(
        index: int, generation: Generation, into: trio.MemorySendChannel[tuple[int, Output]]
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
