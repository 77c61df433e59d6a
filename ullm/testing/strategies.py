"""Strategies for hypothesis: plans of faults, sampling parameters and prompts, which shrink to the simplest.

    from ullm.testing import strategies

    @given(plan=strategies.plans(points=["worker.step", "scheduler.step"]))
    def test_nothing_is_lost(plan): ...

Needs hypothesis, which ullm does not install.
"""

from __future__ import annotations

from collections.abc import Sequence

from ullm.faults import POINTS, Fault, FaultPlan
from ullm.faults.points import actions_at
from ullm.sampling import SamplingParams
from ullm.testing.models import FIRST_WORD

try:
    from hypothesis import strategies as st
except ModuleNotFoundError:
    raise ImportError("ullm.testing.strategies needs hypothesis: pip install hypothesis") from None

STEPS = ("worker.step", "scheduler.step", "router.tokens", "frame.to_worker", "frame.from_worker")
"""Points that a running engine hits all the time, so that a plan for them fires."""

MESSAGES = {"frame.to_worker": "Step", "frame.from_worker": "StepResult"}
"""Frames that a running engine sends all the time."""

ENDLESS = ("hang", "block")
LASTING = ("slow", "delay", *ENDLESS, "jump")


@st.composite
def faults(
    draw: st.DrawFn,
    points: Sequence[str] = STEPS,
    *,
    actions: Sequence[str] | None = None,
    latest: int = 20,
    seconds: float = 1.0,
) -> Fault:
    """Draw a fault that fires.

    Args:
        points: of ullm or of a program's own.
        actions: what may happen; default: whatever is possible at the point, but for ``block`` and ``jump``,
            which hold up the test's own thread or need a virtual clock.
        latest: hit of the point at which it happens at the latest.
        seconds: how long what lasts may take.
    """
    point = draw(st.sampled_from(list(points)))
    possible = [
        action
        for action in actions_at(point)
        if (action in actions if actions is not None else action not in ("block", "jump"))
    ]
    action = draw(st.sampled_from(possible))
    lasts = action in LASTING and not (action in ENDLESS and point.startswith("worker."))
    return Fault(
        point,
        action,
        nth=draw(st.integers(1, latest)),
        seconds=draw(st.floats(0.01, seconds)) if lasts else None,
        message=MESSAGES.get(point),
    )


def plans(
    points: Sequence[str] = STEPS,
    *,
    actions: Sequence[str] | None = None,
    most: int = 3,
    latest: int = 20,
    seconds: float = 1.0,
) -> st.SearchStrategy[str]:
    """Return plans of one to ``most`` faults, as text that can be armed and pasted; see `faults`."""
    one = faults(points, actions=actions, latest=latest, seconds=seconds)
    return st.lists(one, min_size=1, max_size=most).map(lambda found: str(FaultPlan(tuple(found))))


def prompts(vocab_size: int = 512, *, longest: int = 20) -> st.SearchStrategy[list[int]]:
    """Return prompts as token ids of a scripted or tiny model: words, no special tokens."""
    return st.lists(st.integers(FIRST_WORD, vocab_size - 1), min_size=1, max_size=longest)


@st.composite
def sampling_params(draw: st.DrawFn, *, max_tokens: int = 30, choices: int = 2) -> SamplingParams:
    """Draw parameters whose answer is a function of the prompt: greedy, or with a seed."""
    greedy = draw(st.booleans())
    return SamplingParams(
        temperature=0.0 if greedy else draw(st.floats(0.1, 2.0)),
        seed=None if greedy else draw(st.integers(0, 1 << 30)),
        max_tokens=draw(st.integers(1, max_tokens)),
        n=1 if greedy else draw(st.integers(1, choices)),
        ignore_eos=True,
    )


ALL_POINTS = tuple(POINTS)
"""All of ullm's points; not every engine hits each of them."""
