"""Admission limits: what has no room now, and what can never fit."""

from __future__ import annotations

import pytest

from ullm.config import EngineConfig
from ullm.errors import InvalidParameter, QueueFull, TooManyTokens
from ullm.scheduling.admission_limits import AdmissionLimits


def limits(**options: int) -> AdmissionLimits:
    return AdmissionLimits(EngineConfig(max_bs=2, max_num_batched_tokens=16, max_queue=3, **options))


def test_choices_up_to_batch_and_queue_fit() -> None:
    limits().check(live=4, choices=1, tokens=0)
    with pytest.raises(QueueFull):
        limits().check(live=4, choices=2, tokens=0)


def test_more_choices_than_batch_and_queue_never_fit() -> None:
    with pytest.raises(InvalidParameter, match="at most 5"):
        limits().check(live=0, choices=6, tokens=0)


def test_each_replica_adds_a_batch() -> None:
    wide = limits(replicas=2)
    wide.check(live=6, choices=1, tokens=0)
    wide.set_batch_size(1)
    assert wide.capacity == 2
    with pytest.raises(QueueFull):
        wide.check(live=5, choices=1, tokens=0)


def test_tokens_are_limited_together() -> None:
    limited = limits(max_admitted_tokens=100)
    limited.tokens = 60
    limited.check(live=0, choices=1, tokens=40)
    with pytest.raises(TooManyTokens):
        limited.check(live=0, choices=1, tokens=41)
    with pytest.raises(InvalidParameter, match="at most 100"):
        limited.check(live=0, choices=1, tokens=101)
