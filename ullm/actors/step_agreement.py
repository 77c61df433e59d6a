"""The results of a step from all ranks of a replica: one of them counts, and all must agree with it."""

from __future__ import annotations

from collections.abc import Sequence

from ullm.errors import WorkerLost
from ullm.protocol.messages import StepResult


class StepAgreement:
    """Holds a step's result back until every rank has said which tokens it has.

    Args:
        names: the ranks' names.
        lead: the rank that chooses the tokens, whose result is the step's.
    """

    def __init__(self, names: Sequence[str], lead: int) -> None:
        self._names, self._lead = names, lead
        self._steps: dict[int, dict[int, StepResult]] = {}

    def take(self, rank: int, result: StepResult) -> StepResult | None:
        """Return the step's result with the last rank's answer; None before that.

        Raises:
            WorkerLost: a rank has other tokens than the one that chose them.
        """
        if len(self._names) == 1:
            return result
        answers = self._steps.setdefault(result.step_id, {})
        answers[rank] = result
        if len(answers) < len(self._names):
            return None
        del self._steps[result.step_id]
        chosen = answers[self._lead]
        for other, answer in answers.items():
            if answer.digest != chosen.digest:
                cause = f"has other tokens of step {result.step_id} than {self._names[self._lead]} has chosen"
                raise WorkerLost(self._names[other], cause)
        return chosen
