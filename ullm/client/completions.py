"""Any OpenAI-compatible server as a target: ullm, vLLM, llama.cpp's server."""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from ullm.bench.stats import Record
from ullm.bench.workload import Request
from ullm.client.http import Connection, Endpoint, error_message
from ullm.errors import ServerRefused, ServerUnreachable


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Chunk)


class ServerTarget:
    """Streams completions over HTTP; keeps as many connections as there are requests in flight.

    Args:
        model: the name to ask for.
        chat: use /chat/completions instead of /completions.
    """

    def __init__(self, endpoint: Endpoint, model: str, *, chat: bool = False) -> None:
        self.endpoint = endpoint
        self.model = model
        self._chat = chat
        self._idle: list[Connection] = []

    @property
    def name(self) -> str:
        """The server's URL."""
        return self.endpoint.url

    async def run(self, request: Request, record: Record) -> None:
        """One streamed request; see `ullm.bench.load.Target`."""
        connection = self._idle.pop() if self._idle else Connection(self.endpoint)
        try:
            await self._stream(connection, request, record)
        except (ServerRefused, ServerUnreachable) as error:
            record.error = str(error)
        finally:
            self._idle.append(connection)

    async def aclose(self) -> None:
        """Close the connections."""
        for connection in self._idle:
            await connection.aclose()
        self._idle.clear()

    async def _stream(self, connection: Connection, request: Request, record: Record) -> None:
        path = "/chat/completions" if self._chat else "/completions"
        usage: _Usage | None = None
        async with connection.events(path, self._body(request)) as events:
            async for payload in events:
                usage = self._take(payload, record) or usage
        record.tokens = usage.completion_tokens if usage else len(record.arrivals)
        record.prompt_tokens = usage.prompt_tokens if usage else 0

    def _take(self, payload: bytes, record: Record) -> _Usage | None:
        try:
            chunk = _DECODER.decode(payload)
        except msgspec.DecodeError as error:
            raise ServerUnreachable(self.endpoint.url, f"not a chunk of a completion: {error}") from None
        if chunk.error is not None:
            raise ServerRefused(self.endpoint.url, 200, error_message(payload) or "an error in the stream")
        for choice in chunk.choices:
            text = choice.text if choice.delta is None else choice.delta.content
            if text:
                record.arrivals.append(trio.current_time())
            record.finish_reason = choice.finish_reason or record.finish_reason
        return chunk.usage

    def _body(self, request: Request) -> dict[str, Any]:
        ask: dict[str, Any] = (
            {"messages": [{"role": "user", "content": request.prompt}]}
            if self._chat
            else {"prompt": request.prompt}
        )
        # ignore_eos is not OpenAI's, but ullm, vLLM and llama.cpp all have it.
        options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        return {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            **options,
            **ask,
        }


async def first_model(endpoint: Endpoint) -> str:
    """The first model that a server lists.

    Raises:
        ServerUnreachable, ServerRefused: it cannot be asked, or lists none.
    """
    connection = Connection(endpoint)
    try:
        listing = await connection.json("GET", "/models")
    finally:
        await connection.aclose()
    try:
        return str(listing["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise ServerUnreachable(endpoint.url, "it lists no model; name one with --model") from None
