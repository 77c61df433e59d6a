"""Any OpenAI-compatible server as a target: ullm, vLLM, llama.cpp's server."""

from __future__ import annotations

from typing import Any

import trio

from ullm.bench.stats import BenchRecord
from ullm.bench.workload import BenchRequest
from ullm.client.completions import ChunkUsage, CompletionChunk, decode_chunk
from ullm.client.http import Connection, Endpoint
from ullm.errors import ServerRefused, ServerUnreachable


class ServerTarget:
    """Streams completions over HTTP on one connection per request in flight.

    Args:
        model: the model to request.
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

    async def run(self, request: BenchRequest, record: BenchRecord) -> None:
        """Stream one request; see `ullm.bench.load.BenchTarget`."""
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

    async def _stream(self, connection: Connection, request: BenchRequest, record: BenchRecord) -> None:
        path = "/chat/completions" if self._chat else "/completions"
        usage: ChunkUsage | None = None
        async with connection.events(path, self._body(request)) as events:
            async for payload in events:
                chunk = decode_chunk(self.endpoint, payload)
                _note(chunk, record)
                usage = chunk.usage or usage
        record.tokens = usage.completion_tokens if usage else len(record.arrivals)
        record.prompt_tokens = usage.prompt_tokens if usage else 0

    def _body(self, request: BenchRequest) -> dict[str, Any]:
        prompt: dict[str, Any] = (
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
            **prompt,
        }


def _note(chunk: CompletionChunk, record: BenchRecord) -> None:
    for choice in chunk.choices:
        if choice.piece:
            record.arrivals.append(trio.current_time())
        record.finish_reason = choice.finish_reason or record.finish_reason
