"""A request's record: when its reader is notified."""

from __future__ import annotations

from ullm.sampling import SamplingParams
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.sequence import TokenEvent


def test_a_reader_that_waits_is_told_only_of_the_end() -> None:
    notified: list[int] = []
    record = RequestRecord(
        1, "r", [1], SamplingParams(), 9, 1, lambda: notified.append(len(record.token_ids))
    )
    record.take(TokenEvent(1, 0, [5]), now=1.0)
    record.quiet_until = 4.0
    record.take(TokenEvent(1, 1, [6]), now=2.0)
    record.take(TokenEvent(1, 2, [7]), now=3.9)
    assert notified == [1]
    record.take(TokenEvent(1, 3, [8]), now=4.0)
    record.quiet_until = 9.0
    record.take(TokenEvent(1, 4, [9], finish_reason="length"), now=5.0)
    assert notified == [1, 4, 5]


def test_quiet_or_not_an_error_is_told() -> None:
    notified: list[Exception | None] = []
    record = RequestRecord(1, "r", [1], SamplingParams(), 9, 1, lambda: notified.append(record.error))
    record.quiet_until = 9.0
    error = RuntimeError("lost")
    record.fail(error)
    assert notified == [error]


def test_what_is_known_is_dropped_and_events_keep_their_tokens() -> None:
    record = RequestRecord(1, "r", [1], SamplingParams(), 9, 1, lambda: None)
    first = TokenEvent(1, 0, [5, 6])
    assert record.take(first, now=0.0) == 2
    assert record.take(TokenEvent(1, 1, [6, 7]), now=0.0) == 1
    assert (record.token_ids, first.token_ids) == ([5, 6, 7], [5, 6])
