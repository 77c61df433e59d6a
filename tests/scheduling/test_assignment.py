"""Which requests may go to which replicas, and who runs alone."""

from __future__ import annotations

from ullm.sampling import SamplingParams
from ullm.scheduling.assignment import assign, is_culprit
from ullm.scheduling.request import SUSPECT_AFTER, RequestRecord
from ullm.scheduling.routing import ReplicaLoad

NOBODY_HELD = float("inf")


def record(number: int, *, crashes: int = 0) -> RequestRecord:
    params = SamplingParams(seed=0)
    return RequestRecord(number, f"r{number}", [1], params, 9, number, lambda time: None, crashes=crashes)


def load(*records: RequestRecord) -> ReplicaLoad:
    return ReplicaLoad({each.seq_id: each for each in records})


def test_later_arrivals_are_held() -> None:
    first, second = record(1), record(2)
    replica = load()
    assignment = assign([first, second], [replica], 1)
    assert (assignment.queue, assignment.open) == ([first], [replica])


def test_a_suspect_gets_a_replica_for_itself() -> None:
    """Requests that the replica had go to others, after those that waited before them."""
    displaced, waiting, suspect = record(1), record(2), record(3, crashes=SUSPECT_AFTER)
    light, heavy = load(displaced), load(record(4), record(5))
    assignment = assign([waiting, suspect], [light, heavy], NOBODY_HELD)
    assert (assignment.vacated, assignment.alone) == ([light], [(suspect, light)])
    assert (assignment.queue, assignment.open) == ([waiting, displaced], [heavy])


def test_a_replica_with_a_suspect_gets_nothing() -> None:
    assert assign([record(1)], [load(record(2, crashes=SUSPECT_AFTER))], NOBODY_HELD).open == []


def test_with_one_replica_suspects_take_turns_and_others_wait() -> None:
    first, second = record(1, crashes=SUSPECT_AFTER), record(2, crashes=SUSPECT_AFTER)
    replica = load(record(3))
    assignment = assign([first, second], [replica], NOBODY_HELD)
    assert (assignment.vacated, assignment.alone) == ([replica], [(first, replica)])
    assert assignment.open == []


def test_a_culprit_was_alone_in_the_step_of_one_loss_too_many() -> None:
    guilty = record(7, crashes=SUSPECT_AFTER + 1)
    assert is_culprit(guilty, frozenset({7}))
    assert not is_culprit(guilty, frozenset({7, 8}))
    assert not is_culprit(record(7, crashes=SUSPECT_AFTER), frozenset({7}))
