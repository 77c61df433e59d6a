"""Backends of ``ullm chat`` and ``ullm generate``: an engine in this process, or a server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ullm.client.completions import decode_chunk, first_model
from ullm.client.http import Connection, Endpoint
from ullm.config import EngineConfig
from ullm.sampling import SamplingParams

if TYPE_CHECKING:
    from ullm.engine import Engine

Message = dict[str, str]


@dataclass
class StreamedAnswer:
    """One answer while it grows: ``text`` is its stream; ``details`` are complete at its end."""

    text: AsyncGenerator[str, None]
    details: dict[str, Any] = field(default_factory=dict)
    """``finish_reason``, ``prompt_tokens``, ``completion_tokens``, as far as known."""


class ChatBackend(Protocol):
    """A model to talk to."""

    name: str

    def ask(
        self, prompt: str | list[Message], params: SamplingParams
    ) -> AbstractAsyncContextManager[StreamedAnswer]:
        """Continue a raw text, or answer a conversation; leaving the context stops the answer.

        Raises:
            RequestError, ServerRefused: the request cannot be served.
            ServerUnreachable: there is no server.
        """


class EngineBackend:
    """An engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name = engine.model_name

    @asynccontextmanager
    async def ask(self, prompt: str | list[Message], params: SamplingParams) -> AsyncIterator[StreamedAnswer]:
        """See `ChatBackend.ask`."""
        tokenizer = self._engine.tokenizer
        assert tokenizer is not None, "an open engine has a tokenizer"
        if isinstance(prompt, str):
            tokens = await tokenizer.encode(prompt)
        else:
            tokens = await tokenizer.encode_chat(prompt)
        async with self._engine.generate(tokens, self._fitted(params, len(tokens))) as generation:
            details: dict[str, Any] = {}
            async with aclosing(_texts(generation, details)) as text:
                yield StreamedAnswer(text, details)

    def _fitted(self, params: SamplingParams, prompt_tokens: int) -> SamplingParams:
        """Lower ``max_tokens`` to what fits into the context: a person at a terminal wants an answer."""
        assert self._engine.info is not None, "an open engine has a model"
        room = self._engine.info.context_len - prompt_tokens
        if params.max_tokens is None or room < 1 or params.max_tokens <= room:
            return params
        return replace(params, max_tokens=room, max_new_tokens=None)


async def _texts(generation: AsyncIterator[Any], details: dict[str, Any]) -> AsyncGenerator[str, None]:
    async for output in generation:
        details["prompt_tokens"] = output.num_prompt_tokens
        details["completion_tokens"] = output.num_generated_tokens
        if output.finish_reason is not None:
            details["finish_reason"] = output.finish_reason
        if output.text:
            yield output.text


class ServerBackend:
    """A running OpenAI-compatible server."""

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self._endpoint = endpoint
        self.name = model

    @asynccontextmanager
    async def ask(self, prompt: str | list[Message], params: SamplingParams) -> AsyncIterator[StreamedAnswer]:
        """See `ChatBackend.ask`."""
        chat = not isinstance(prompt, str)
        body = {"model": self.name, ("messages" if chat else "prompt"): prompt, **request_fields(params)}
        # One connection per answer: a person may think for longer than a server keeps one open.
        connection = Connection(self._endpoint)
        try:
            path = "/chat/completions" if chat else "/completions"
            details: dict[str, Any] = {}
            async with connection.events(path, body) as events:
                async with aclosing(self._texts(events, details)) as text:
                    yield StreamedAnswer(text, details)
        finally:
            await connection.aclose()

    async def _texts(
        self, events: AsyncIterator[bytes], details: dict[str, Any]
    ) -> AsyncGenerator[str, None]:
        async for payload in events:
            chunk = decode_chunk(self._endpoint, payload)
            if chunk.usage is not None:
                details["prompt_tokens"] = chunk.usage.prompt_tokens
                details["completion_tokens"] = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if choice.finish_reason:
                    details["finish_reason"] = choice.finish_reason
                if choice.piece:
                    yield choice.piece


def request_fields(params: SamplingParams) -> dict[str, Any]:
    """Return the sampling parameters that differ from their defaults, as fields of a request.

    Temperature is always sent, because servers have defaults of their own.
    """
    default = SamplingParams()
    names = (name for name in SamplingParams.__dataclass_fields__ if name != "max_new_tokens")
    changed = {
        name: getattr(params, name) for name in names if getattr(params, name) != getattr(default, name)
    }
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return {"temperature": params.temperature, **changed, **options}


@asynccontextmanager
async def open_backend(
    config: EngineConfig, url: str | None, model: str | None, api_key: str | None
) -> AsyncIterator[ChatBackend]:
    """Open a backend on the server at ``url``, or on a new engine without one.

    Args:
        model: the model to request of the server; None: the first that it lists.
    """
    if url is not None:
        endpoint = Endpoint.parse(url, api_key)
        yield ServerBackend(endpoint, model or await first_model(endpoint))
        return
    from ullm.engine import open_engine

    async with open_engine(config) as engine:
        yield EngineBackend(engine)
