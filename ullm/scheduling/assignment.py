"""Which waiting requests may go to which replicas, among which `Routing` chooses; the router obeys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic

from ullm.scheduling.request import SUSPECT_AFTER, RequestRecord
from ullm.scheduling.routing import R


@dataclass(frozen=True, slots=True)
class Assignment(Generic[R]):
    """Changes to carry out, in this order.

    Args:
        vacated: replicas whose requests are taken back, because a suspect needs the replica for itself.
        alone: suspects, and the replica that each one gets for itself.
        queue: the other requests that may run now, in their order.
        open: the replicas that they may go to; none if ``queue`` has to wait.
    """

    vacated: list[R]
    alone: list[tuple[RequestRecord, R]]
    queue: list[RequestRecord]
    open: list[R]


def assign(waiting: Iterable[RequestRecord], replicas: Iterable[R], last_arrival: float) -> Assignment[R]:
    """Give suspects a replica for themselves, the least loaded one, and leave the others to the rest.

    Args:
        waiting: requests without a replica, in the order of their turn.
        replicas: those that may get requests.
        last_arrival: later arrivals are on hold, and stay without a replica.
    """
    left = [replica for replica in replicas if not replica.has_suspect]
    result: Assignment[R] = Assignment([], [], [], left)
    queue: list[RequestRecord] = []
    for record in waiting:
        if not record.is_suspect:
            queue.append(record)
        elif left:
            alone = min(left, key=lambda replica: len(replica.requests))
            left.remove(alone)
            result.vacated.append(alone)
            result.alone.append((record, alone))
    for replica in result.vacated:
        queue += replica.requests.values()
    result.queue.extend(record for record in queue if record.arrival <= last_arrival)
    return result


def is_culprit(record: RequestRecord, in_step: frozenset[int]) -> bool:
    """Whether a request is failed for good: its workers died again, and it was alone in their step."""
    return record.crashes > SUSPECT_AFTER and in_step == {record.seq_id}
