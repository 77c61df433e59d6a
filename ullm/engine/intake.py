"""The way into an engine for records of requests that have been made elsewhere, as in another process."""

from __future__ import annotations

from collections.abc import Sequence

from ullm.actors.router import Router
from ullm.engine.admission import Admission
from ullm.engine.current_model import CurrentModel
from ullm.errors import EngineNotReady, InvalidParameter, PromptTooLong
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.sequence import FinishReason


class Intake:
    """Admits and ends records; whoever uses it does what a `Generation` does otherwise."""

    def __init__(self, admission: Admission, router: Router, current: CurrentModel) -> None:
        self._admission = admission
        self._router = router
        self._current = current

    @property
    def current(self) -> CurrentModel:
        """The model that new requests get."""
        return self._current

    def arrival(self) -> int:
        """Return a number for a new record: its ``seq_id``, and its place in the queue."""
        return self._router.arrival()

    def admit(self, records: Sequence[RequestRecord], *, resumed: bool = False) -> None:
        """Admit all choices of a request, or none; call `leave` once when all of it has been read.

        Args:
            resumed: it was admitted before, so it is taken whatever the limits of requests are now.

        Raises:
            RequestError: as `Admission.check`; or the records do not fit the model.
        """
        self._check(records)
        self._admission.admit(records, resumed=resumed)

    def finish(self, record: RequestRecord, reason: FinishReason) -> bool:
        """End a request early with the tokens that it has; return False if it has ended already."""
        return not record.done and self._router.finish(record.seq_id, reason)

    def leave(self) -> None:
        """Note that an admitted request has been read to its end, or given up."""
        self._admission.leave()

    def _check(self, records: Sequence[RequestRecord]) -> None:
        """Return if the model can run them; it may be another one than they were made for."""
        info = self._current.info
        if info is None:
            raise EngineNotReady("starting")
        for record in records:
            length = len(record.prompt_token_ids) + len(record.token_ids)
            worst = max([*record.prompt_token_ids, *record.token_ids], default=0)
            if worst >= info.vocab_size:
                raise InvalidParameter(
                    f"prompt: token id {worst} is not in the model's vocabulary of {info.vocab_size}",
                    "prompt",
                )
            if (
                not record.prompt_token_ids
                or length >= record.max_total
                or record.max_total > info.context_len
            ):
                raise PromptTooLong(length, info.context_len)
