"""Running one HTTP request's generations: all their outputs, in one stream, with usage and timings."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import trio

from ullm.errors import PromptTooLong
from ullm.sampling import SamplingParams
from ullm.server.metrics import Metrics, RequestTimer
from ullm.server.responses import PromptTokensDetails, Usage
from ullm.server.types import Engine, Generation

if TYPE_CHECKING:
    from ullm.generation import Output

Outputs = AsyncIterator[tuple[int, "Output"]]


@dataclass
class Job:
    """One HTTP request to generate: its prompts, and what has come of them.

    Args:
        request_id: the response's id; the engine's requests are numbered under it.
        prompt_field: where the client put the prompt, for errors.
        arrived: trio time from which the request's timeout counts, encoding and queueing included.
        generated_tokens: per prompt and choice.
    """

    engine: Engine
    metrics: Metrics
    request_id: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    arrived: float
    prompt_field: str = "prompt"
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
                try:
                    self.generations.append(await stack.enter_async_context(generation))
                except PromptTooLong as error:
                    error.param = self.prompt_field
                    raise
            if len(self.generations) == 1:
                yield _Noted(self, timer, _Numbered(self.generations[0]))
            else:
                merged = await stack.enter_async_context(_merged(self.generations))
                yield _Noted(self, timer, merged)

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


class _Numbered:
    """The outputs of the only prompt. Like `_Noted` no generator, which would have to be closed."""

    def __init__(self, generation: Generation) -> None:
        self._outputs = aiter(generation)

    def __aiter__(self) -> Outputs:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        return 0, await anext(self._outputs)


class _Noted:
    """Outputs on their way to the client, with what usage and metrics need taken down."""

    def __init__(self, job: Job, timer: RequestTimer, outputs: Outputs) -> None:
        self._job, self._timer, self._outputs = job, timer, outputs

    def __aiter__(self) -> Outputs:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        job = self._job
        try:
            index, output = await anext(self._outputs)
        except StopAsyncIteration:
            self._timer.end(sum(map(len, job.prompts)), sum(job.generated_tokens.values()))
            raise
        job.cached_tokens.setdefault(index, output.num_cached_tokens)
        job.generated_tokens[index, output.index] = output.num_generated_tokens
        self._timer.note((index, output.index), len(output.token_ids))
        return index, output


@asynccontextmanager
async def _merged(generations: Sequence[Generation]) -> AsyncIterator[Outputs]:
    sender, receiver = trio.open_memory_channel[tuple[int, "Output"]](len(generations))

    async def pump(
        index: int, generation: Generation, into: trio.MemorySendChannel[tuple[int, Output]]
    ) -> None:
        with into:
            async for output in generation:
                await into.send((index, output))

    with receiver:
        async with trio.open_nursery() as nursery:
            with sender:
                for index, generation in enumerate(generations):
                    nursery.start_soon(pump, index, generation, sender.clone())
            try:
                yield receiver
            finally:
                nursery.cancel_scope.cancel()
