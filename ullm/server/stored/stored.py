"""What all stored answers have in common, whichever route they came by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import msgspec
import trio

from ullm.errors import RequestError
from ullm.protocol.messages import TokenLogprobs
from ullm.sampling import SamplingParams
from ullm.server.api.errors import as_request_error

Durability = Literal["never", "with --journal", "always"]
"""Whether an answer is written to a journal: no, if the operator has named one, or in any case."""


CANDIDATE_BYTES = 64
"""About the bytes that one candidate of a log probability takes in memory."""


def size_of(score: TokenLogprobs | None) -> int:
    """Return about the bytes of memory that the log probabilities of a token take."""
    return CANDIDATE_BYTES * (1 + (0 if score is None else len(score.top)))


class Head(Protocol):
    """What every stored answer's head has: its name, whose it is, and what makes it.

    Args:
        owner: digest of the key that asked for it; empty without keys.
        created: seconds since 1970.
        served: model, arithmetic, adapter and release; another one would go on with another text.
        params: how it is sampled, and by which adapter.
    """

    id: str
    owner: str
    created: int
    served: str
    params: SamplingParams


H = TypeVar("H", bound=Head)
E = TypeVar("E", bound=msgspec.Struct)


class Stored(ABC, Generic[H, E]):
    """An answer that is being made, or has been made.

    Attributes:
        head: what was asked.
        end: None until it has ended.
        scope: cancels the task that makes it.
        failure: the error that it ended with, if this process has made it.
        interrupted: true if this process stops, and the next one goes on with it.
        end_written: true once the journal has its end.
    """

    def __init__(self, head: H, end: E | None) -> None:
        self.head = head
        self.end = end
        self.scope = trio.CancelScope()
        self.interrupted = False
        self.failure: RequestError | None = None
        self.end_written = end is not None
        self._changed = trio.Event()

    @property
    @abstractmethod
    def durability(self) -> Durability:
        """Whether it is written to a journal."""

    @property
    @abstractmethod
    def log(self) -> list[int]:
        """Its tokens, in the form that the journal has; it only grows."""

    @property
    def notes(self) -> Sequence[object]:
        """What else is known with its tokens, for the journal; it only grows, and only with `log`."""
        return ()

    @property
    def scored(self) -> bool:
        """Whether its tokens have log probabilities."""
        return self.head.params.logprobs is not None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.end is not None

    @property
    @abstractmethod
    def size(self) -> int:
        """About the bytes that it takes in memory and in the journal."""

    def encode_head(self) -> bytes:
        """Return what it takes to make the rest again, for the journal."""
        return msgspec.msgpack.encode(self.head)

    def encode_end(self) -> bytes:
        """Return how it ended, for the journal."""
        return msgspec.msgpack.encode(self.end)

    def finish(self, reason: str, error: BaseException | None = None) -> None:
        """Note how it ended, unless it has."""
        if not self.ended:
            if error is not None:
                self.failure = as_request_error(error)
            self._end(reason, self.failure)
        self.announce()

    @abstractmethod
    def _end(self, reason: str, failure: RequestError | None) -> None:
        """Note how it ended."""

    def announce(self) -> None:
        """Wake whoever waits for a change."""
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def wait_changed(self) -> None:
        """Wait for a token, or for the end."""
        await self._changed.wait()


AnyStored: TypeAlias = Stored[Any, Any]
"""Whatever it answers."""
