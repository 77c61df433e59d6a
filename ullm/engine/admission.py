"""Admission: the one place that decides whether a request is taken."""

from __future__ import annotations

from collections.abc import Sequence

from ullm.actors.router import Router
from ullm.engine.life import EngineLife
from ullm.engine.lifecycle import Lifecycle
from ullm.engine.readers import Readers
from ullm.errors import EngineSleeping
from ullm.scheduling.request import RequestRecord


class Admission:
    """Decides whether a request is admitted, by the engine's life, its sleep and its limits.

    Args:
        readers: where an admitted request's reader is counted until it leaves.
    """

    def __init__(self, life: EngineLife, router: Router, lifecycle: Lifecycle, readers: Readers) -> None:
        self._life = life
        self._router = router
        self._lifecycle = lifecycle
        self._readers = readers

    def check(self, choices: int = 1, tokens: int = 0) -> None:
        """Return if a request would be admitted now.

        Cheap, so that a server can refuse a request before it is tokenized. Only `admit` is binding.

        Args:
            tokens: prompt and possible output, of all choices together.

        Raises:
            EngineDead, EngineNotReady, EngineDraining: the engine does not run.
            EngineSleeping: it is asleep, and requests do not wake it.
            QueueFull, TooManyTokens: there is no room now.
            InvalidParameter: there will never be room for so large a request.
        """
        self._life.check_running()
        if not self._lifecycle.registered:
            raise EngineSleeping
        self._router.check_room(choices, tokens)

    def admit(self, records: Sequence[RequestRecord], *, resumed: bool = False) -> None:
        """Admit all choices of a request, or none; call `leave` once when its reader has left.

        Args:
            resumed: it was admitted before, by an engine that is gone; it needs no room.

        Raises:
            RequestError: as `check`.
        """
        if resumed:
            self._life.check_running()
        else:
            self.check(len(records), sum(record.max_total for record in records))
        self._readers.enter()
        for record in records:
            self._router.submit(record)

    def leave(self) -> None:
        """Note that the reader of an admitted request has left."""
        self._readers.leave()
