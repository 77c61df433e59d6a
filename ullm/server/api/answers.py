"""The common parts of answers to requests to generate, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import msgspec

from ullm.protocol.messages import TokenLogprobs
from ullm.server.api.errors import as_request_error, error_body
from ullm.server.api.responses import Usage

if TYPE_CHECKING:
    from ullm.engine.output import Output

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()

_OWN_REASONS = ("timeout", "abort")

Scores = Callable[[int], Sequence[TokenLogprobs | None] | None]
"""Given the number of a prompt, returns the log probabilities of its tokens, once its first output has come;
None where the client does not want them."""


@dataclass(frozen=True)
class AnswerHead:
    """The fields that an answer and all its chunks share.

    Args:
        created: seconds since 1970.
    """

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk_fields(self, object_name: str) -> dict[str, object]:
        """Return the shared fields of the chunks of a stream."""
        return {"id": self.id, "object": object_name, "created": self.created, "model": self.model}


@dataclass(frozen=True)
class AnswerStyle:
    """What a client, and the server's operator, want to see of an answer.

    Args:
        usage: the stream ends with the usage.
        running_usage: each event of the stream has the usage so far.
        token_ids: the token ids of the prompt and of the text.
        openai_reasons: a ``finish_reason`` that OpenAI does not have becomes ``length``, and another field
            has it.
    """

    usage: bool = False
    running_usage: bool = False
    token_ids: bool = False
    openai_reasons: bool = False

    def reason(self, reason: str | None) -> str | None:
        """Return the ``finish_reason`` to show."""
        return "length" if self.openai_reasons and reason in _OWN_REASONS else reason

    def own_reason(self, reason: str | None) -> str | msgspec.UnsetType:
        """Return the reason that `reason` has replaced."""
        return reason if self.openai_reasons and reason in _OWN_REASONS else msgspec.UNSET


class AnswerFormat(Protocol):
    """Puts outputs into the shape of one route; either `events` and `end`, or `add` and `whole`."""

    async def prepare(self, prompt: int, output: Output) -> None:
        """Do what takes long for an output of prompt number ``prompt``, before it is passed on.

        Other tasks run in between.
        """

    def events(self, prompt: int, output: Output) -> bytes:
        """Return the events for an output of prompt number ``prompt``; maybe none."""

    def end(self, usage: Usage) -> bytes:
        """Return the last events of the stream."""

    def add(self, prompt: int, output: Output) -> None:
        """Add an output of prompt number ``prompt`` to the whole answer."""

    def whole(self, usage: Usage) -> msgspec.Struct:
        """Return the body of the whole answer, when all outputs have been added."""


class ChunkEncoder:
    """Encodes the chunks of one stream.

    Args:
        head: the fields that all chunks share.
        with_usage: chunks say ``"usage": null``, because the last one will have it.
    """

    def __init__(self, head: dict[str, object], *, with_usage: bool) -> None:
        self._head = b"data: " + _encoder.encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._with_usage = with_usage

    def choice(self, choice: msgspec.Struct, others: Mapping[str, object] | None = None) -> bytes:
        """Return an event about one choice.

        Args:
            others: further fields of the chunk; ``usage`` stands in for null.
        """
        tail = self._tail
        if others:
            null = {"usage": None} if self._with_usage else {}
            tail = b"]," + _encoder.encode({**null, **others})[1:] + b"\n\n"
        return b"".join((self._head, _encoder.encode(choice), tail))

    def end(self, usage: msgspec.Struct) -> bytes:
        """Return the last events: the usage, if the client wants it, and ``[DONE]``."""
        if not self._with_usage:
            return DONE
        return b"".join((self._head, b'],"usage":', _encoder.encode(usage), b"}\n\n", DONE))


def error_event(error: BaseException) -> bytes:
    """Return the events that end a stream with an error."""
    return b"data: " + error_body(as_request_error(error)) + b"\n\n" + DONE
