"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
from quart import Response, g
from quart_trio import QuartTrio

from ullm.errors import InvalidParameter
from ullm.sampling import MAX_LOGPROBS, SamplingParams
from ullm.server.api import requests
from ullm.server.api.logprobs import chat_logprobs, prompt_logprobs
from ullm.server.api.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Delta,
)
from ullm.server.api.schemas import ChatCompletionRequest
from ullm.server.api.types import Engine, Tokenizer
from ullm.server.http import sse
from ullm.server.http.connection import Writer
from ullm.server.http.pacing import Pacer
from ullm.server.metrics import Metrics
from ullm.server.routes.outputs import Job

if TYPE_CHECKING:
    from ullm.engine.output import Output


def install(app: QuartTrio, engine: Engine, metrics: Metrics, pacer: Pacer, keep_alive: float) -> None:
    """Add the route to ``app``.

    Args:
        pacer: of all streams.
        keep_alive: seconds of silence after which a stream gets a comment.
    """
    read = requests.json_reader(ChatCompletionRequest)

    async def chat_completions() -> Response:
        engine.check_admission()
        _, tokenizer = requests.loaded(engine)
        request: ChatCompletionRequest = await read()
        requests.check_model(engine, request.model)
        _check(request)
        params = _params(request)
        prompt = await requests.encode_conversation(
            tokenizer,
            request.messages,
            None if request.tool_choice == "none" else request.tools,
            request.add_generation_prompt,
            request.chat_template_kwargs,
        )
        name = f"chatcmpl-{g.request_id}"
        job = Job(engine, metrics, name, [prompt], params, g.arrived, prompt_field="messages")
        answer = _Answer(request, job, tokenizer, keep_alive)
        if request.stream:
            return sse.response(job, pacer, answer.stream)
        return Response(msgspec.json.encode(await answer.whole()), content_type="application/json")

    app.post("/v1/chat/completions")(chat_completions)


def _check(request: ChatCompletionRequest) -> None:
    if request.response_format is not None and request.response_format.type != "text":
        raise InvalidParameter(
            f"response_format: only {{'type': 'text'}} is supported, not {request.response_format.type!r}",
            "response_format",
        )
    if request.tool_choice not in (None, "auto", "none"):
        raise InvalidParameter("tool_choice must be 'auto' or 'none'; calls cannot be forced", "tool_choice")
    if request.top_logprobs is not None:
        if not request.logprobs:
            raise InvalidParameter("top_logprobs needs logprobs to be true", "top_logprobs")
        if not 0 <= request.top_logprobs <= MAX_LOGPROBS:
            raise InvalidParameter(
                f"top_logprobs must be from 0 to {MAX_LOGPROBS}, got {request.top_logprobs}", "top_logprobs"
            )


def _params(request: ChatCompletionRequest) -> SamplingParams:
    if request.max_completion_tokens is not None and request.max_completion_tokens < 1:
        raise InvalidParameter(
            f"max_completion_tokens must be at least 1, got {request.max_completion_tokens}",
            "max_completion_tokens",
        )
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return requests.sampling_params(request, max_tokens=limit, logprobs=logprobs)


class _Answer:
    """The answer to one request, streamed or whole."""

    def __init__(
        self, request: ChatCompletionRequest, job: Job, tokenizer: Tokenizer, keep_alive: float
    ) -> None:
        self._request = request
        self._job = job
        self._tokenizer = tokenizer
        self._keep_alive = keep_alive
        self._created = int(time.time())

    async def whole(self) -> ChatCompletion:
        """Wait for everything."""
        choices = [
            ChatChoice(index=index, message=ChatMessage(content="")) for index in range(self._job.params.n)
        ]
        async with self._job.run() as outputs:
            async for _, output in outputs:
                self._grow(choices[output.index], output)
        answer = ChatCompletion(
            id=self._job.request_id,
            created=self._created,
            model=self._job.engine.model_name,
            choices=choices,
            usage=self._job.usage(),
        )
        if self._job.params.prompt_logprobs is not None:
            answer.prompt_logprobs = prompt_logprobs(
                self._job.generations[0].prompt_logprobs, self._tokenizer
            )
        return answer

    def _grow(self, choice: ChatChoice, output: Output) -> None:
        choice.message.content += output.text
        choice.finish_reason = output.finish_reason
        choice.stop_reason = output.stop_reason
        more = self._logprobs(output)
        if more is not None:
            if choice.logprobs is None:
                choice.logprobs = more
            else:
                choice.logprobs.content += more.content

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        return None if output.logprobs is None else chat_logprobs(output.logprobs, self._tokenizer)

    async def stream(self, writer: Writer) -> None:
        """Write each choice's role, an event per output, the usage if it is wanted, and ``[DONE]``."""
        with_usage = requests.wants_usage(self._request)
        head: dict[str, object] = {
            "id": self._job.request_id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._job.engine.model_name,
        }
        encoder = sse.ChunkEncoder(head, with_usage=with_usage)
        opening = b"".join(
            encoder.choice(ChatChunkChoice(index=index, delta=Delta(role="assistant", content="")))
            for index in range(self._job.params.n)
        )
        async with self._job.run() as outputs:
            async for _, output in sse.KeptAlive(outputs, writer, self._keep_alive):
                events = opening + b"".join(encoder.choice(chunk) for chunk in self._chunks(output))
                opening = b""
                if events:
                    await writer.write(events)
        await writer.write((encoder.usage(self._job.usage()) if with_usage else b"") + sse.DONE)

    def _chunks(self, output: Output) -> list[ChatChunkChoice]:
        """What an output adds, and the end of its choice as a chunk of its own."""
        chunks = []
        logprobs = self._logprobs(output)
        if output.text or (logprobs is not None and logprobs.content):
            delta = Delta(content=output.text)
            chunks.append(ChatChunkChoice(index=output.index, delta=delta, logprobs=logprobs))
        if output.finish_reason is not None:
            end = ChatChunkChoice(index=output.index, delta=Delta(), finish_reason=output.finish_reason)
            end.stop_reason = output.stop_reason
            chunks.append(end)
        return chunks
