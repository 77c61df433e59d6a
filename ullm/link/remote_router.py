"""The requests of a front end: what it would submit again, should the engine be lost.

It stands where the router stands in an engine: readers wait for its records, and a lost engine is to it what
a lost worker is to the router. While there is no engine, the records wait here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import trio

from ullm.errors import RequestPoisoned
from ullm.link.faults import to_error
from ullm.link.messages import Admitted, Choice, Failed, Finish, Refused, Submit, Tokens
from ullm.logs import get_logger
from ullm.protocol.messages import Frame
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.sequence import FinishReason, TokenEvent

MAX_LOSSES = 5
"""Engines that a request may lose in a row without a new token, before it counts as their murderer."""

Send = Callable[[Frame], None]
"""Sends a message to the engine, soon."""

log = get_logger(__name__)


@dataclass(eq=False)
class Submission:
    """The choices of one request, which are admitted together.

    Attributes:
        answered: set when the engine has taken it or not, or is lost.
        admitted: whether an engine has taken it, or it waits for one.
        refusal: why it was not taken.
        losses: engines lost since it last had a new token.
        length: tokens that it had at the last loss.
    """

    records: list[RequestRecord]
    answered: trio.Event = field(default_factory=trio.Event)
    admitted: bool = False
    refusal: Exception | None = None
    losses: int = 0
    length: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all choices."""
        return sum(len(record.token_ids) for record in self.records)


class RemoteRouter:
    """Owns the records of a front end's requests; implements `OwnsRequests`.

    Its methods are synchronous, except those that wait.
    """

    def __init__(self) -> None:
        self._submissions: dict[int, Submission] = {}
        self._records: dict[int, RequestRecord] = {}
        self._arrivals = 0
        self._idle = trio.Event()
        self._send: Send | None = None
        self.resumed = 0

    # --- for readers -------------------------------------------------------------------------------------

    def arrival(self) -> int:
        """Return a number for a new choice."""
        self._arrivals += 1
        return self._arrivals

    @property
    def live(self) -> int:
        """Choices not yet finished."""
        return len(self._records)

    def submit(self, records: Sequence[RequestRecord]) -> Submission:
        """Have the engine run a request, now or when there is one again."""
        submission = Submission(list(records))
        if not self._records:
            self._idle = trio.Event()
        for record in records:
            self._records[record.seq_id] = record
            self._submissions[record.seq_id] = submission
        if self._send is None:
            submission.admitted = True
            submission.answered.set()
        else:
            self._send(_message(self._live_of(submission), resumed=False))
        return submission

    def finish(self, seq_id: int, reason: FinishReason) -> bool:
        """End a choice with the tokens that it has; return False if it has ended already."""
        record = self._remove(seq_id)
        if record is None:
            return False
        if self._send is not None:
            self._send(Finish(seq_id, reason))
        record.finish(reason)
        return True

    def finish_all(self, reason: FinishReason) -> int:
        """End every choice with the tokens that it has; return their number."""
        return sum(self.finish(seq_id, reason) for seq_id in list(self._records))

    def fail_all(self, error: Callable[[], Exception]) -> int:
        """End every choice with an error of its own; return their number."""
        live = list(self._records)
        for seq_id in live:
            self._fail(seq_id, error(), tell=True)
        return len(live)

    async def wait_idle(self) -> None:
        """Wait until no choice is live."""
        while self._records:
            await self._idle.wait()

    # --- for the link ------------------------------------------------------------------------------------

    def connect(self, send: Send) -> int:
        """Submit everything to an engine that has come, from where it is; return the number of requests."""
        self._send = send
        waiting = list(dict.fromkeys(self._submissions.values()))
        for submission in waiting:
            self.resumed += bool(submission.losses)
            send(_message(self._live_of(submission), resumed=True))
        return len(waiting)

    def disconnect(self) -> int:
        """Keep everything for the next engine, but what may be the reason; return the number of requests."""
        if self._send is None:
            return 0
        self._send = None
        lost = list(dict.fromkeys(self._submissions.values()))
        for submission in lost:
            tokens = submission.tokens
            submission.losses = 1 if tokens > submission.length else submission.losses + 1
            submission.length = tokens
            if submission.losses > MAX_LOSSES:
                self._give_up(submission)
            submission.admitted = True
            submission.answered.set()
        return len(lost)

    def take(self, message: Admitted | Refused | Tokens | Failed) -> None:
        """Take what the engine says of requests; what it says of those that have ended is late.

        Raises:
            ValueError: tokens are missing; the engine must be asked again.
        """
        match message:
            case Admitted(seq_id):
                if (submission := self._submissions.get(seq_id)) is not None:
                    submission.admitted = True
                    submission.answered.set()
            case Refused(seq_id, error):
                self._refuse(seq_id, to_error(error))
            case Tokens(events):
                now = trio.current_time()
                for event in events:
                    self._take(event, now)
            case Failed(seq_id, error):
                self._fail(seq_id, to_error(error), tell=False)

    # --- inside --------------------------------------------------------------------------------------------

    def _take(self, event: TokenEvent, now: float) -> None:
        record = self._records.get(event.seq_id)
        if record is None:
            return
        if record.token_ids and event.prompt_logprobs is not None:
            event = msgspec.structs.replace(event, prompt_logprobs=None)  # it has them
        record.take(event, now)
        if event.finish_reason is not None:
            self._remove(event.seq_id)

    def _refuse(self, seq_id: int, error: Exception) -> None:
        submission = self._submissions.get(seq_id)
        if submission is None:
            return
        waited = submission.admitted
        for record in submission.records:
            if waited:
                self._fail(record.seq_id, error, tell=False)
            else:
                self._remove(record.seq_id)
        submission.refusal = error
        submission.answered.set()

    def _give_up(self, submission: Submission) -> None:
        first = submission.records[0]
        log.error("request poisoned", request=first.request_id, engines_lost=submission.losses)
        for record in submission.records:
            self._fail(record.seq_id, RequestPoisoned(record.request_id, submission.losses), tell=False)

    def _fail(self, seq_id: int, error: Exception, *, tell: bool) -> None:
        record = self._remove(seq_id)
        if record is None:
            return
        if tell and self._send is not None:
            self._send(Finish(seq_id, "abort"))
        record.fail(error)

    def _remove(self, seq_id: int) -> RequestRecord | None:
        record = self._records.pop(seq_id, None)
        self._submissions.pop(seq_id, None)
        if not self._records:
            self._idle.set()
        return record

    def _live_of(self, submission: Submission) -> list[RequestRecord]:
        return [record for record in submission.records if record.seq_id in self._records]


def _message(live: list[RequestRecord], *, resumed: bool) -> Submit:
    """Return the message that has the engine run a request's choices that have not ended."""
    first = live[0]
    choices = [
        Choice(
            record.seq_id,
            record.params,
            record.max_total,
            record.grammar,
            list(record.token_ids),
            "" if record.adapter is None else record.adapter.digest,
        )
        for record in live
    ]
    return Submit(first.request_id, first.prompt_token_ids, choices, first.client, first.session, resumed)
