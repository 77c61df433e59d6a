"""Which replica gets which waiting request. The router carries it out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ullm.scheduling.request import SUSPECT_AFTER, RequestRecord


@dataclass(slots=True, eq=False)
class ReplicaLoad:
    """The requests that one replica has, by ``seq_id``."""

    requests: dict[int, RequestRecord] = field(default_factory=dict)

    @property
    def has_suspect(self) -> bool:
        """Whether it runs a suspect, which must stay alone."""
        return len(self.requests) == 1 and next(iter(self.requests.values())).is_suspect


R = TypeVar("R", bound=ReplicaLoad)


@dataclass(frozen=True, slots=True)
class Assignment(Generic[R]):
    """Changes to carry out, in this order.

    Args:
        vacated: replicas whose requests are taken back, because a suspect needs the replica for itself.
        assigned: requests, and the replica that each one goes to.
    """

    vacated: list[R]
    assigned: list[tuple[RequestRecord, R]]


def assign(waiting: Iterable[RequestRecord], replicas: Iterable[R], last_arrival: float) -> Assignment[R]:
    """Assign each waiting request to the least loaded replica; suspects run alone, and first.

    Args:
        waiting: requests without a replica, in the order of their turn.
        replicas: those that may get requests.
        last_arrival: later arrivals are on hold, and stay without a replica.
    """
    counts = {replica: len(replica.requests) for replica in replicas if not replica.has_suspect}
    result: Assignment[R] = Assignment([], [])
    queue: list[RequestRecord] = []
    for record in waiting:
        if not record.is_suspect:
            queue.append(record)
        elif counts:
            alone = min(counts, key=counts.__getitem__)
            del counts[alone]
            result.vacated.append(alone)
            result.assigned.append((record, alone))
    for replica in result.vacated:
        queue += replica.requests.values()
    for record in queue:
        if counts and record.arrival <= last_arrival:
            target = min(counts, key=counts.__getitem__)
            counts[target] += 1
            result.assigned.append((record, target))
    return result


def is_culprit(record: RequestRecord, in_step: frozenset[int]) -> bool:
    """Whether a request is failed for good: its workers died again, and it was alone in their step."""
    return record.crashes > SUSPECT_AFTER and in_step == {record.seq_id}
