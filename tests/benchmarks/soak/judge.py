"""Verdicts on growth of costs: the last tenth of a run against the first one after the warm-up. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from tests.benchmarks.soak.sample import Sample
from ullm.errors import UllmError

MIB = 1 << 20
SHARE = 0.1
"""Share of the run after its warm-up that is compared, at its beginning and at its end."""
LEAST = 3
"""Minimum number of readings that are compared."""
FILES = 8
"""Growth of open descriptors that counts as chance: connections that are being closed or opened."""

Kind = Literal["rate", "time", "memory", "files"]


class TooShort(UllmError):
    """There are too few readings to compare a beginning with an end."""

    def __init__(self, count: int) -> None:
        super().__init__(
            f"{count} readings after the warm-up are too few to compare, {2 * LEAST} are the least; "
            "use more --seconds or a shorter --interval"
        )


class Reading(msgspec.Struct, frozen=True):
    """The costs of one interval between two samples.

    Args:
        seconds, requests: since the load began, at the interval's end.
        steps, tokens: per second.
        front, worker: processor milliseconds per step.
        yardstick: processor milliseconds of the fixed work at the interval's end.
        pss, front_rss, worker_rss: MiB at the interval's end.
        files: open descriptors of all processes at the interval's end.
    """

    seconds: float
    requests: int
    steps: float
    tokens: float
    front: float
    worker: float
    yardstick: float
    pss: float
    front_rss: float
    worker_rss: float
    files: int


@dataclass(frozen=True)
class Cost:
    """A cost that must not grow.

    Args:
        of: returns its value in a reading.
    """

    name: str
    unit: str
    kind: Kind
    of: Callable[[Reading], float]


COSTS = (
    Cost("steps", "1/s", "rate", lambda reading: reading.steps),
    Cost("tokens", "1/s", "rate", lambda reading: reading.tokens),
    Cost("processor time per step, front end", "ms", "time", lambda reading: reading.front),
    Cost("processor time per step, worker", "ms", "time", lambda reading: reading.worker),
    Cost("memory of the tree (PSS)", "MiB", "memory", lambda reading: reading.pss),
    Cost("memory of the front end (RSS)", "MiB", "memory", lambda reading: reading.front_rss),
    Cost("memory of the worker (RSS)", "MiB", "memory", lambda reading: reading.worker_rss),
    Cost("open descriptors", "", "files", lambda reading: reading.files),
)


class Tolerance(msgspec.Struct, frozen=True):
    """Changes that do not count as growth.

    Args:
        rate: share by which a rate may fall. Rates depend on other work on the machine.
        time: share by which processor time per step may grow.
        memory, slack: share, and MiB beyond it, by which memory may grow.
    """

    rate: float = 0.1
    time: float = 0.05
    memory: float = 0.03
    slack: float = 4.0


class Finding(msgspec.Struct, frozen=True):
    """One cost at the beginning and at the end.

    Args:
        change: change from first to last, as a share.
        beside: the same in relation to the yardstick, for processor time only.
        allowed: maximum of ``last``; the minimum for a rate.
    """

    name: str
    unit: str
    first: float
    last: float
    change: float
    beside: float | None
    allowed: float
    good: bool


def readings(samples: Sequence[Sample]) -> list[Reading]:
    """Return the intervals between samples, without those that have no step or in which workers changed."""
    pairs = itertools.pairwise(samples)
    return [_reading(a, b) for a, b in pairs if b.steps > a.steps and a.worker_pids == b.worker_pids]


def _reading(before: Sample, after: Sample) -> Reading:
    seconds, steps = after.seconds - before.seconds, after.steps - before.steps
    return Reading(
        seconds=after.seconds,
        requests=after.requests,
        steps=steps / seconds,
        tokens=(after.tokens - before.tokens) / seconds,
        front=(after.front.cpu - before.front.cpu) * 1000 / steps,
        worker=(after.worker.cpu - before.worker.cpu) * 1000 / steps,
        yardstick=after.yardstick * 1000,
        pss=after.pss / MIB,
        front_rss=after.front.rss / MIB,
        worker_rss=after.worker.rss / MIB,
        files=after.front.files + after.worker.files + after.standby.files,
    )


def ends(intervals: Sequence[Reading], warm_up: float) -> tuple[Sequence[Reading], Sequence[Reading]]:
    """Return the readings at the beginning, after a share of warm-up, and at the end.

    Raises:
        TooShort
    """
    warm = intervals[round(len(intervals) * warm_up) :]
    if len(warm) < 2 * LEAST:
        raise TooShort(len(warm))
    count = max(LEAST, round(len(warm) * SHARE))
    return warm[:count], warm[-count:]


def judge(first: Sequence[Reading], last: Sequence[Reading], tolerance: Tolerance) -> list[Finding]:
    """Compare every cost."""
    return [_find(cost, first, last, tolerance) for cost in COSTS]


def _find(cost: Cost, first: Sequence[Reading], last: Sequence[Reading], tolerance: Tolerance) -> Finding:
    before, after = typical(cost, first), typical(cost, last)
    allowed = _allowed(cost.kind, before, tolerance)
    change, beside = _change(before, after), None
    good = after >= allowed if cost.kind == "rate" else after <= allowed
    if cost.kind == "time":
        beside = _change(before / _speed(first), after / _speed(last))
        good = min(change, beside) <= tolerance.time
    return Finding(cost.name, cost.unit, before, after, change, beside, allowed, good)


def typical(cost: Cost, intervals: Sequence[Reading]) -> float:
    """Return one value for several readings; for times and rates, which others disturb, a quartile."""
    values = [cost.of(reading) for reading in intervals]
    match cost.kind:
        case "time":
            return _quartile(values, 0)
        case "rate":
            return _quartile(values, 2)
        case _:
            return statistics.median(values)


def _quartile(values: Sequence[float], which: int) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[which] if len(values) > 1 else values[0]


def _speed(intervals: Sequence[Reading]) -> float:
    return _quartile([reading.yardstick for reading in intervals], 0)


def _change(before: float, after: float) -> float:
    return after / before - 1 if before else 0.0


def _allowed(kind: Kind, before: float, tolerance: Tolerance) -> float:
    match kind:
        case "rate":
            return before * (1 - tolerance.rate)
        case "time":
            return before * (1 + tolerance.time)
        case "memory":
            return before * (1 + tolerance.memory) + tolerance.slack
        case "files":
            return before + FILES
