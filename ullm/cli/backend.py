"""Who answers ``ullm chat`` and ``ullm generate``: an engine in this process, or a server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ullm.client.completions import first_model
from ullm.client.http import Connection, Endpoint, error_message
from ullm.config import EngineConfig
from ullm.errors import ServerRefused, ServerUnreachable
from ullm.sampling import SamplingParams

if TYPE_CHECKING:
    from ullm.engine import Engine

Message = dict[str, str]


@dataclass
class Answer:
    """One answer while it grows: ``text`` is its stream; the rest is known at its end."""

    text: AsyncGenerator[str, None]
    details: dict[str, Any] = field(default_factory=dict)
    """``finish_reason``, ``prompt_tokens``, ``completion_tokens``, as far as they are known."""


class Backend(Protocol):
    """Something that answers."""

    name: str

    def ask(self, prompt: str | list[Message], params: SamplingParams) -> AbstractAsyncContextManager[Answer]:
        """Go on from a raw text, or answer a conversation. Leaving the context stops the answer.

        Raises:
            RequestError, ServerRefused: the request cannot be served.
            ServerUnreachable: no server.
        """


class EngineBackend:
    """An engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name = engine.model_name

    @asynccontextmanager
    async def ask(self, prompt: str | list[Message], params: SamplingParams) -> AsyncIterator[Answer]:
        """See `Backend.ask`."""
        tokenizer = self._engine.tokenizer
        assert tokenizer is not None, "an open engine has a tokenizer"
        if isinstance(prompt, str):
            whole = await tokenizer.encode(prompt)
        else:
            whole = await tokenizer.encode_chat(prompt)
        async with self._engine.generate(whole, self._fitted(params, len(whole))) as generation:
            details: dict[str, Any] = {}
            async with aclosing(_texts(generation, details)) as text:
                yield Answer(text, details)

    def _fitted(self, params: SamplingParams, prompt_tokens: int) -> SamplingParams:
        """As many tokens as asked for, or as there is room for: a person at a terminal means the former."""
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
    async def ask(self, prompt: str | list[Message], params: SamplingParams) -> AsyncIterator[Answer]:
        """See `Backend.ask`."""
        chat = not isinstance(prompt, str)
        body = {"model": self.name, ("messages" if chat else "prompt"): prompt, **request_fields(params)}
        # A connection per answer: between two, a person may think longer than a server keeps one open.
        connection = Connection(self._endpoint)
        try:
            path = "/chat/completions" if chat else "/completions"
            details: dict[str, Any] = {}
            async with connection.events(path, body) as events:
                async with aclosing(self._texts(events, details)) as text:
                    yield Answer(text, details)
        finally:
            await connection.aclose()

    async def _texts(
        self, events: AsyncIterator[bytes], details: dict[str, Any]
    ) -> AsyncGenerator[str, None]:
        async for payload in events:
            if error := error_message(payload):
                raise ServerRefused(self._endpoint.url, 200, error)
            try:
                chunk = msgspec.json.decode(payload)
                details.update(chunk.get("usage") or {})
                choices = chunk["choices"]
            except (msgspec.DecodeError, KeyError, AttributeError):
                raise ServerUnreachable(self._endpoint.url, "its stream is not OpenAI's") from None
            for choice in choices:
                if choice.get("finish_reason"):
                    details["finish_reason"] = choice["finish_reason"]
                if text := choice.get("text") or (choice.get("delta") or {}).get("content"):
                    yield text


def request_fields(params: SamplingParams) -> dict[str, Any]:
    """Sampling parameters as fields of a request: only those that differ from the default.

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
) -> AsyncIterator[Backend]:
    """A server's backend with ``url``, else one around a new engine.

    Args:
        model: the name to ask the server for; None: the first that it lists.
    """
    if url is not None:
        endpoint = Endpoint.parse(url, api_key)
        yield ServerBackend(endpoint, model or await first_model(endpoint))
        return
    from ullm.engine import open_engine

    async with open_engine(config) as engine:
        yield EngineBackend(engine)
