"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from quart import Response, g
from quart_trio import QuartTrio

from ullm.errors import InvalidParameter
from ullm.protocol.messages import ModelInfo
from ullm.sampling import SamplingParams
from ullm.server.api import requests
from ullm.server.api.logprobs import Offsets, completion_logprobs, extend, prompt_logprobs
from ullm.server.api.responses import Completion, CompletionChoice, Usage
from ullm.server.api.schemas import CompletionRequest
from ullm.server.api.types import Engine, Tokenizer
from ullm.server.http import sse
from ullm.server.http.connection import Writer
from ullm.server.http.pacing import Pacer
from ullm.server.metrics import Metrics
from ullm.server.routes.outputs import Job

if TYPE_CHECKING:
    from ullm.engine.output import Output

DEFAULT_MAX_TOKENS = 16
"""As OpenAI's API has it for this route."""
MAX_PROMPTS = 1024


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens, and as the text that ``echo`` repeats.

    Args:
        is_text: it was given as a text, in which there are no special tokens.
    """

    token_ids: list[int]
    text: str
    is_text: bool


def install(app: QuartTrio, engine: Engine, metrics: Metrics, pacer: Pacer, keep_alive: float) -> None:
    """Add the route to ``app``.

    Args:
        pacer: of all streams.
        keep_alive: seconds of silence after which a stream gets a comment.
    """
    read = requests.json_reader(CompletionRequest)

    async def completions() -> Response:
        engine.check_admission()
        info, tokenizer = requests.loaded(engine)
        request: CompletionRequest = await read()
        requests.check_model(engine, request.model)
        _check(request)
        prompts = await _prompts(request, info, tokenizer)
        params = _params(request, info, prompts)
        tokens = [prompt.token_ids for prompt in prompts]
        job = Job(engine, metrics, f"cmpl-{g.request_id}", tokens, params, g.arrived)
        answer = _Answer(request, job, tokenizer, prompts, keep_alive)
        if request.stream:
            return sse.response(job, pacer, answer.stream)
        return Response(msgspec.json.encode(await answer.whole()), content_type="application/json")

    app.post("/v1/completions")(completions)


def _check(request: CompletionRequest) -> None:
    if request.suffix:
        raise InvalidParameter("suffix is not supported", "suffix")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidParameter("best_of is only supported when it equals n", "best_of")


async def _prompts(request: CompletionRequest, info: ModelInfo, tokenizer: Tokenizer) -> list[Prompt]:
    given = request.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        entries: Sequence[str | int | list[int]] = [given]  # type: ignore[list-item]  # checked in _prompt
    else:
        entries = given
    if not entries:
        raise InvalidParameter("prompt is empty; it must have at least one token", "prompt")
    if len(entries) > MAX_PROMPTS:
        raise InvalidParameter(f"prompt has {len(entries)} entries; at most {MAX_PROMPTS}", "prompt")
    special = request.add_special_tokens is not False
    return [await _prompt(entry, request.prompt, info, tokenizer, special) for entry in entries]


async def _prompt(
    entry: str | int | list[int], given: object, info: ModelInfo, tokenizer: Tokenizer, special: bool
) -> Prompt:
    if isinstance(entry, str):
        token_ids, text = await tokenizer.encode(entry, add_special_tokens=special), entry
    elif isinstance(entry, list) and all(isinstance(token_id, int) for token_id in entry):
        requests.check_token_ids(entry, info.vocab_size, "prompt")
        token_ids, text = entry, tokenizer.decode(entry, skip_special_tokens=False)
    else:
        raise InvalidParameter(
            "prompt must be a text, token ids, or a list of either, not a mixture", "prompt"
        )
    if not token_ids:
        raise InvalidParameter("prompt is empty; it must have at least one token", "prompt")
    return Prompt(token_ids, text, isinstance(entry, str))


def _params(request: CompletionRequest, info: ModelInfo, prompts: list[Prompt]) -> SamplingParams:
    """Sampling parameters; ``max_tokens`` 0 is possible with ``echo``, to score a prompt."""
    max_tokens = request.max_tokens
    if max_tokens is None:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, info.context_len - longest))
        max_tokens = max(max_tokens, request.min_tokens or 0)
    elif max_tokens == 0 and request.echo:
        max_tokens = 1
    scores = request.logprobs if request.echo and request.prompt_logprobs is None else request.prompt_logprobs
    return requests.sampling_params(
        request, max_tokens=max_tokens, logprobs=request.logprobs, prompt_logprobs=scores
    )


class _Answer:
    """The answer to one request, streamed or whole."""

    def __init__(
        self,
        request: CompletionRequest,
        job: Job,
        tokenizer: Tokenizer,
        prompts: list[Prompt],
        keep_alive: float,
    ) -> None:
        self._request = request
        self._job = job
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._keep_alive = keep_alive
        self._created = int(time.time())
        self._only_echo = bool(request.echo) and request.max_tokens == 0
        self._opened: set[int] = set()
        self._offsets: dict[int, Offsets] = {}

    async def whole(self) -> Completion:
        """Wait for everything."""
        choices: dict[int, CompletionChoice] = {}
        async with self._job.run() as outputs:
            async for prompt, output in outputs:
                delta = self._delta(prompt, output)
                _grow(choices.setdefault(delta.index, delta), delta)
        return Completion(
            id=self._job.request_id,
            created=self._created,
            model=self._job.engine.model_name,
            choices=[choices[index] for index in sorted(choices)],
            usage=self._usage(),
        )

    async def stream(self, writer: Writer) -> None:
        """Write an event per output, the usage if it is wanted, and ``[DONE]``."""
        with_usage = requests.wants_usage(self._request)
        head: dict[str, object] = {
            "id": self._job.request_id,
            "object": "text_completion",
            "created": self._created,
            "model": self._job.engine.model_name,
        }
        encoder = sse.ChunkEncoder(head, with_usage=with_usage)
        async with self._job.run() as outputs:
            async for prompt, output in sse.KeptAlive(outputs, writer, self._keep_alive):
                delta = self._delta(prompt, output)
                if delta.text or delta.finish_reason is not None or delta.logprobs is not None:
                    await writer.write(encoder.choice(delta))
        await writer.write((encoder.usage(self._usage()) if with_usage else b"") + sse.DONE)

    def _delta(self, prompt: int, output: Output) -> CompletionChoice:
        """What an output adds; the first one of a choice brings the prompt's echo and scores."""
        number = prompt * self._job.params.n + output.index
        first = number not in self._opened
        self._opened.add(number)
        delta = CompletionChoice(index=number, text="" if self._only_echo else output.text)
        delta.finish_reason = output.finish_reason
        delta.stop_reason = output.stop_reason
        if self._only_echo and output.finish_reason == "stop":
            delta.finish_reason, delta.stop_reason = "length", None
        if output.logprobs is not None and not self._only_echo:
            offsets = self._offsets.get(number) or self._offsets_of(number, prompt)
            delta.logprobs = completion_logprobs(output.token_ids, output.logprobs, self._tokenizer, offsets)
        if first:
            self._open(delta, prompt)
        return delta

    def _offsets_of(self, number: int, prompt: int) -> Offsets:
        """A choice's, in the text that it is part of."""
        given = self._prompts[prompt]
        start = len(given.text) if self._request.echo else 0
        self._offsets[number] = found = Offsets(
            self._tokenizer,
            start,
            prompt_token_ids=given.token_ids,
            skip_special_tokens=self._job.params.skip_special_tokens,
        )
        return found

    def _open(self, delta: CompletionChoice, prompt: int) -> None:
        generation, request = self._job.generations[prompt], self._request
        if request.prompt_logprobs is not None:
            delta.prompt_logprobs = prompt_logprobs(generation.prompt_logprobs, self._tokenizer)
        if not request.echo:
            return
        given = self._prompts[prompt]
        delta.text = given.text + delta.text
        if request.logprobs is not None and generation.prompt_logprobs is not None:
            offsets = Offsets(self._tokenizer, skip_special_tokens=given.is_text)
            scores = completion_logprobs(
                generation.prompt_token_ids, generation.prompt_logprobs, self._tokenizer, offsets
            )
            if delta.logprobs is not None:
                extend(scores, delta.logprobs)
            delta.logprobs = scores

    def _usage(self) -> Usage:
        return self._job.usage(completion_tokens=0 if self._only_echo else None)


def _grow(choice: CompletionChoice, delta: CompletionChoice) -> None:
    if choice is delta:
        return
    choice.text += delta.text
    choice.finish_reason = delta.finish_reason
    choice.stop_reason = delta.stop_reason
    if delta.logprobs is not None:
        if choice.logprobs is None:
            choice.logprobs = delta.logprobs
        else:
            extend(choice.logprobs, delta.logprobs)
