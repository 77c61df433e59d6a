"""A step's result counts once all ranks have the same tokens."""

from __future__ import annotations

import pytest

from ullm.actors.step_agreement import StepAgreement
from ullm.errors import WorkerLost
from ullm.protocol.messages import Sampled, StepResult

NAMES = ["replica0.rank0", "replica0.rank1"]


def result(step_id: int, digest: int, *tokens: int) -> StepResult:
    return StepResult(step_id, [Sampled(7, list(tokens))] if tokens else [], 0.0, digest)


def test_one_rank_needs_nobody() -> None:
    chosen = result(1, 0, 5)
    assert StepAgreement(NAMES[:1], 0).take(0, chosen) is chosen


def test_the_lead_s_result_comes_with_the_last_answer() -> None:
    agreement, chosen = StepAgreement(NAMES, 1), result(1, 17, 5)
    assert agreement.take(1, chosen) is None
    assert agreement.take(1, result(2, 18, 6)) is None
    assert agreement.take(0, result(1, 17)) is chosen
    assert agreement.take(0, result(2, 18)) == result(2, 18, 6)


def test_a_rank_with_other_tokens_is_lost() -> None:
    agreement = StepAgreement(NAMES, 0)
    assert agreement.take(0, result(3, 17, 5)) is None
    with pytest.raises(WorkerLost, match=r"rank1 has other tokens of step 3 than replica0\.rank0 has chosen"):
        agreement.take(1, result(3, 18))
