"""The common parts of answers to requests to generate, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import msgspec

from ullm.protocol.messages import TokenLogprobs
from ullm.server.api.responses import Usage

if TYPE_CHECKING:
    from ullm.engine.output import Output

Scores = Callable[[int], Sequence[TokenLogprobs | None] | None]
"""Returns the log probabilities of the tokens of prompt number ..., once its first output has come; None
where the client does not want them."""


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


class AnswerFormat(Protocol):
    """Puts outputs into the shape of one route; either `events` and `end`, or `add` and `whole`."""

    def events(self, prompt: int, output: Output) -> bytes:
        """Return the events for an output of prompt number ``prompt``; maybe none."""

    def end(self, usage: Usage) -> bytes:
        """Return the last events of the stream."""

    def add(self, prompt: int, output: Output) -> None:
        """Add an output of prompt number ``prompt`` to the whole answer."""

    def whole(self, usage: Usage) -> msgspec.Struct:
        """Return the body of the whole answer, when all outputs have been added."""
