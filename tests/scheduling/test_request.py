"""A request's record: when its reader is notified."""

from __future__ import annotations

import math

from ullm.sampling import SamplingParams
from ullm.scheduling.request import RequestRecord
from ullm.scheduling.sequence import TokenEvent


def test_the_reader_is_notified_with_the_time_of_tokens_and_with_infinity_at_the_end() -> None:
    calls: list[tuple[float, int]] = []
    record = RequestRecord(
        1, "r", [1], SamplingParams(), 9, 1, lambda time: calls.append((time, len(record.token_ids)))
    )
    record.take(TokenEvent(1, 0, [5]), now=1.0)
    record.take(TokenEvent(1, 1, [6]), now=2.0)
    record.take(TokenEvent(1, 2, [7], finish_reason="length"), now=5.0)
    assert calls == [(1.0, 1), (2.0, 2), (math.inf, 3)]


def test_an_error_is_an_end() -> None:
    calls: list[tuple[float, Exception | None]] = []
    record = RequestRecord(
        1, "r", [1], SamplingParams(), 9, 1, lambda time: calls.append((time, record.error))
    )
    error = RuntimeError("lost")
    record.fail(error)
    assert calls == [(math.inf, error)]


def test_what_is_known_is_dropped_and_events_keep_their_tokens() -> None:
    record = RequestRecord(1, "r", [1], SamplingParams(), 9, 1, lambda time: None)
    first = TokenEvent(1, 0, [5, 6])
    assert record.take(first, now=0.0) == 2
    assert record.take(TokenEvent(1, 1, [6, 7]), now=0.0) == 1
    assert (record.token_ids, first.token_ids) == ([5, 6, 7], [5, 6])
