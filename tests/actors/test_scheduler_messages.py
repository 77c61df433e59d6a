"""What a scheduler reads later is what it was told, whatever became of the request meanwhile."""

from __future__ import annotations

from ullm.actors.scheduler import Abort, MailboxHandle, SchedulerMessage, Submit
from ullm.sampling import SamplingParams
from ullm.scheduling.request import RequestRecord
from ullm.supervision.actor import Mailbox


def test_a_request_that_is_taken_back_at_once_keeps_the_number_it_was_submitted_by() -> None:
    mailbox = Mailbox[SchedulerMessage](10, "scheduler")
    record = RequestRecord(3, "r3", [1], SamplingParams(seed=1), 9, 3, lambda time: None)
    handle = MailboxHandle(mailbox)
    handle.submit(record)
    handle.abort(3)
    record.seq_id = 11  # as `Router` does when it takes a request back
    submitted, aborted = mailbox.receive_nowait(), mailbox.receive_nowait()
    assert isinstance(submitted, Submit)
    assert isinstance(aborted, Abort)
    assert submitted.sequence.seq_id == aborted.seq_id == 3
