"""Completions of OpenAI-compatible servers: the chunks of a stream, and the models that a server lists."""

from __future__ import annotations

from typing import Any

import msgspec

from ullm.client.http import Connection, Endpoint, error_message
from ullm.errors import ServerRefused, ServerUnreachable


class ChunkUsage(msgspec.Struct):
    """Token counts, as the server counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChunkDelta(msgspec.Struct):
    """A piece of a chat answer."""

    content: str | None = None


class ChunkChoice(msgspec.Struct):
    """One choice's part of a chunk: ``text`` of a completion, ``delta`` of a chat."""

    index: int = 0
    text: str | None = None
    delta: ChunkDelta | None = None
    finish_reason: str | None = None

    @property
    def piece(self) -> str:
        """The new text, empty if there is none."""
        return (self.text if self.delta is None else self.delta.content) or ""


class CompletionChunk(msgspec.Struct):
    """One event of a streamed completion or chat completion; fields that nobody reads are left out."""

    choices: list[ChunkChoice] = []
    usage: ChunkUsage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(CompletionChunk)


def decode_chunk(endpoint: Endpoint, payload: bytes) -> CompletionChunk:
    """Decode one event of a stream.

    Raises:
        ServerUnreachable: it is not a chunk of a completion.
        ServerRefused: it is an error, sent inside the stream.
    """
    try:
        chunk = _DECODER.decode(payload)
    except msgspec.DecodeError as error:
        raise ServerUnreachable(endpoint.url, f"not a chunk of a completion: {error}") from None
    if chunk.error is not None:
        raise ServerRefused(endpoint.url, 200, error_message(payload) or "an error in the stream")
    return chunk


async def first_model(endpoint: Endpoint) -> str:
    """Return the first model that a server lists.

    Raises:
        ServerUnreachable, ServerRefused: the server does not answer, or lists no model.
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
