"""What a `Generation` and a stop need of the owner of requests: the router, or a link to one elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ullm.scheduling.request import RequestRecord
from ullm.scheduling.sequence import FinishReason


class OwnsRequests(Protocol):
    """Owns the records of all live requests; see `ullm.actors.router.Router`."""

    @property
    def live(self) -> int:
        """Choices not yet finished."""

    def arrival(self) -> int:
        """Return a number for a new choice: its ``seq_id``, and its place in the queue."""

    def finish(self, seq_id: int, reason: FinishReason) -> bool:
        """End a request early with the tokens that it has; return False if it has ended already."""

    def finish_all(self, reason: FinishReason) -> int:
        """End every request with the tokens that it has; return their number."""

    def fail_all(self, error: Callable[[], Exception]) -> int:
        """End every request with an error of its own; return their number."""

    async def wait_idle(self) -> None:
        """Wait until no request is live."""


class Admits(Protocol):
    """Decides whether a request is taken; see `ullm.engine.admission.Admission`."""

    def admit(self, records: Sequence[RequestRecord]) -> None:
        """Admit all choices of a request, or none; call `leave` once when its reader has left."""

    def leave(self) -> None:
        """Note that the reader of an admitted request has left."""


class Wakes(Protocol):
    """Wakes an engine for its stop; see `ullm.engine.lifecycle.Lifecycle`."""

    @property
    def state(self) -> str:
        """``awake``, ``falling_asleep``, ``asleep`` or ``waking``."""

    async def wake(self) -> None:
        """Wake up."""
