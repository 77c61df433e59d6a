"""A request of a front end: made, read and kept here, computed by the engine at the other end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import trio

from ullm.engine.current_model import CurrentModel
from ullm.engine.generation import Generation
from ullm.engine.readers import Readers
from ullm.link.engine_view import EngineSeen
from ullm.link.remote_router import RemoteRouter, Submission
from ullm.sampling import SamplingParams
from ullm.scheduling.request import RequestRecord


class RemoteAdmission:
    """Submits one request to the engine; implements `Admits`.

    Args:
        readers: where a request's reader is counted until it leaves.

    Attributes:
        submission: what was submitted; None before that.
    """

    def __init__(self, seen: EngineSeen, router: RemoteRouter, readers: Readers) -> None:
        self._seen = seen
        self._router = router
        self._readers = readers
        self.submission: Submission | None = None

    def admit(self, records: Sequence[RequestRecord]) -> None:
        """Submit all choices of a request; whether they are admitted, the engine will say."""
        self._seen.check()
        self._readers.enter()
        self.submission = self._router.submit(records)

    def leave(self) -> None:
        """Note that a reader has left."""
        self._readers.leave()


class RemoteGeneration(Generation):
    """See `Generation`; entering it also waits for the engine's answer, unless the engine is away."""

    def __init__(
        self,
        admission: RemoteAdmission,
        router: RemoteRouter,
        current: CurrentModel,
        prompt: Sequence[int] | str,
        params: SamplingParams,
        request_id: str,
        pace: Callable[[], float] | None = None,
        client: str = "",
        emitted: Sequence[int] = (),
        session: str = "",
    ) -> None:
        super().__init__(
            admission, router, current, prompt, params, request_id, pace, client, emitted, session
        )
        self._remote_admission = admission

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        submission = self._remote_admission.submission
        assert submission is not None, "it is made on entering"
        try:
            await submission.answered.wait()
            if submission.refusal is not None and not submission.admitted:
                raise submission.refusal
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.__aexit__(None, None, None)
            raise
        return self
