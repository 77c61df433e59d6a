"""Verdicts about what the clients have seen while faults came."""

from __future__ import annotations

from ullm.chaos.chaos_plan import ChaosPlan
from ullm.chaos.verify import Verdict
from ullm.chaos.world import World


def load_verdicts(world: World, plan: ChaosPlan, answered: int, unfired: int) -> list[Verdict]:
    """Judge what the clients have seen while faults came.

    Args:
        answered: answers during that time.
        unfired: faults that were armed and have not fired.
    """
    refused, injected = world.counts["refused"], len(world.faults)
    gaps = (end - begin for answer in world.answers for begin, end in answer.gaps)
    longest = max(gaps, default=0.0)
    return [
        Verdict(
            "every admitted request ended once, as without faults",
            not world.violations,
            f"{world.counts['answered']} answered, {refused} refused with 429",
        ),
        Verdict(
            f"at least {plan.least_answered} answered while faults came",
            answered >= plan.least_answered,
            f"{answered}",
        ),
        Verdict(
            f"no stream silent for {plan.max_gap:g} s", longest <= plan.max_gap, f"at most {longest:.2f} s"
        ),
        Verdict(
            "as many faults as asked for",
            injected >= plan.faults,
            f"{injected} of {plan.faults}; {unfired} armed ones never fired",
        ),
    ]
