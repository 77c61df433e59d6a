"""Two and three faults at once, in every combination: the engine serves again, or ends as documented.

Each request ends once, with the text of the undisturbed run. What a failure says is enough to repeat it:
``run_case(Case(...), model)``.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.coincidences import MEMBERS, PHASES, Case, Member, Sweep, pairs
from ullm.testing import write_scripted_model

OFFSETS = (-2, -1, 0, 1, 2)
REPLICAS = (1, 2)
RANKS = (1, 1, 2)

RUNNING = [
    member
    for member in MEMBERS
    if member[0] in ("worker.step", "frame.to_worker", "frame.from_worker", "scheduler.step", "router.tokens")
]
"""What happens in steps."""


def name(member: Member) -> str:
    return ":".join(member)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is loaded in no time, and again after each fault: few blocks, no chat template."""
    folder = write_scripted_model(
        tmp_path_factory.mktemp("scripted"), num_blocks=64, load_seconds=0.0, wake_seconds=0.0
    )
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def sweep(model: Path) -> Sweep:
    return Sweep(model)


def draw(seed: int, count: int, faults: int) -> list[Case]:
    """Cases of all kinds: members, offsets, phases, replicas, ranks."""
    source = random.Random(f"coincidences {seed}")
    return [
        Case(
            tuple(source.choices(MEMBERS, k=faults)),
            tuple(source.choices(OFFSETS, k=faults - 1)),
            source.choice(PHASES),
            source.choice(REPLICAS),
            source.choice(RANKS),
        )
        for _ in range(count)
    ]


def test_there_are_all_pairs() -> None:
    count = sum(len(pairs(member)) for member in MEMBERS)
    assert (len(MEMBERS), count) == (83, 83 * 84 // 2)


def test_a_worker_and_its_scheduler(sweep: Sweep) -> None:
    """Lost in the same moment: the restarted scheduler sent to workers that had gone, for ever."""
    for offset in OFFSETS:
        for replicas in REPLICAS:
            for loss in ("crash", "exit", "raise", "hang", "stop"):
                faults = (("worker.step", loss), ("scheduler.step", "raise"))
                sweep.run(Case(faults, (offset,), replicas=replicas))
    sweep.check()
    assert sweep.fired == sweep.count == 50


FOUND = [
    # A request taken back before its scheduler had read of it came to the scheduler by its next number.
    Case(
        (("worker.wake", "oom"), ("frame.to_worker", "duplicate"), ("worker.step", "oom")),
        (2, -1),
        "drain asleep",
        2,
    ),
]
"""Cases that went wrong once."""


@pytest.mark.parametrize("case", FOUND, ids=repr)
def test_what_was_found(sweep: Sweep, case: Case) -> None:
    sweep.run(case)
    sweep.check()


@pytest.mark.parametrize("seed", range(4))
def test_some_cases(sweep: Sweep, seed: int) -> None:
    for case in [*draw(seed, 10, 2), *draw(seed, 5, 3)]:
        sweep.run(case)
    sweep.check()


def all_in_the_same_step() -> list[Case]:
    return [
        Case(pair, replicas=replicas) for replicas in REPLICAS for first in MEMBERS for pair in pairs(first)
    ]


def all_within_steps_one_apart() -> list[Case]:
    return [
        Case(pair, (offset,)) for offset in (-1, 1) for first in RUNNING for pair in pairs(first, RUNNING)
    ]


def test_the_sample_has_everything_once() -> None:
    """Each member comes first and second, in each phase of the engine something happens."""
    cases = [case for part in range(PARTS) for case in sample(part)]
    assert {case.faults[0] for case in cases} == {case.faults[1] for case in cases} == set(MEMBERS)
    assert {(case.phase, case.replicas) for case in cases} >= {
        (phase, replicas) for phase in PHASES for replicas in REPLICAS
    }


PARTS = 10
SHARE = 24
"""One of so many cases is in the slow tier; all of them are in the long one."""


def sample(part: int) -> list[Case]:
    """One of `PARTS` parts of a sample of all kinds of cases, by seed."""
    source = random.Random("a sample of coincidences")
    chosen = []
    for cases in (all_in_the_same_step(), all_within_steps_one_apart()):
        chosen += source.sample(cases, len(cases) // SHARE)
    chosen += [*draw(100, 200, 2), *draw(101, 100, 3)]
    return chosen[part::PARTS]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_sample_of_all(sweep: Sweep, part: int) -> None:
    for case in sample(part):
        sweep.run(case)
    sweep.check()


@pytest.mark.long
@pytest.mark.parametrize("replicas", REPLICAS)
@pytest.mark.parametrize("first", MEMBERS, ids=name)
def test_all_pairs_in_the_same_step(sweep: Sweep, first: Member, replicas: int) -> None:
    for pair in pairs(first):
        sweep.run(Case(pair, replicas=replicas))
    sweep.check()


@pytest.mark.long
@pytest.mark.parametrize("replicas", REPLICAS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("first", MEMBERS, ids=name)
def test_all_pairs_offsets_and_phases(sweep: Sweep, first: Member, phase: str, replicas: int) -> None:
    for pair in pairs(first):
        for offset in OFFSETS:
            sweep.run(Case(pair, (offset,), phase, replicas))
    sweep.check()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1000, 1100))
def test_many_triples(sweep: Sweep, seed: int) -> None:
    for case in draw(seed, 100, 3):
        sweep.run(case)
    sweep.check()
