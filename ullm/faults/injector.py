"""The injector: counts hits, and decides which faults happen."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ullm.errors import ConfigError, FaultInjected
from ullm.faults.plan import Fault, FaultPlan
from ullm.logs import get_logger

HISTORY = 10_000
"""Fired faults to remember."""

A_LONG_TIME = 1e9
"""Seconds; stands for an unlimited time where a finite number is needed."""

log = get_logger(__name__)


class ArmedFault(msgspec.Struct, frozen=True):
    """A fault of a plan, and its counts.

    Args:
        number: counted from 1, in the order in which faults were armed.
        fault: its text, in the language of plans.
        hits: hits of its point that match its filters.
        fired: how often it has happened.
        remaining: how often it may still happen; None: without limit.
    """

    number: int
    fault: str
    hits: int
    fired: int
    remaining: int | None


class FiredFault(msgspec.Struct, frozen=True):
    """A fault that was injected.

    Args:
        number: number of its `ArmedFault`.
        at: time, in seconds since 1970.
        hit: number of the hit of its point, counted from 1.
        replica, rank, epoch: place and incarnation of the worker, if it concerned one.
        message: type of the frame, if it concerned one.
    """

    number: int
    at: float
    point: str
    action: str
    hit: int
    replica: int | None = None
    rank: int | None = None
    epoch: int | None = None
    message: str | None = None


class FaultReport(msgspec.Struct, frozen=True):
    """All armed faults and the history of an injector.

    Args:
        armed: armed faults, including exhausted ones.
        fired: the last `HISTORY` injected faults, oldest first.
    """

    armed: list[ArmedFault]
    fired: list[FiredFault]


@dataclass(frozen=True, slots=True)
class FaultSite:
    """Where a point is hit; None where no single worker, or no frame, is concerned."""

    point: str
    replica: int | None = None
    rank: int | None = None
    epoch: int | None = None
    message: str | None = None


class _FaultCounter:
    """The counts of one armed fault. Its random numbers depend on seed, index and hit only."""

    def __init__(self, number: int, fault: Fault, seed: str) -> None:
        self.number = number
        self.fault = fault
        self.hits = self.fired = 0
        self._seed = seed

    @property
    def exhausted(self) -> bool:
        return self.fired >= self.fault.limit

    def hit(self, site: FaultSite) -> bool:
        """Count a hit; return whether the fault happens."""
        fault = self.fault
        if self.exhausted or not _concerns(fault, site):
            return False
        self.hits += 1
        if self.hits < fault.nth:
            return False
        if fault.probability < 1 and random.Random(f"{self._seed}:{self.hits}").random() >= fault.probability:
            return False
        self.fired += 1
        return True

    def describe(self) -> ArmedFault:
        limit = self.fault.limit
        remaining = None if limit == float("inf") else int(limit) - self.fired
        return ArmedFault(self.number, str(self.fault), self.hits, self.fired, remaining)


def _concerns(fault: Fault, site: FaultSite) -> bool:
    return fault.point == site.point and all(
        expected is None or expected == actual
        for expected, actual in (
            (fault.replica, site.replica),
            (fault.rank, site.rank),
            (fault.epoch, site.epoch),
            (fault.message, site.message),
        )
    )


class FaultInjector:
    """Counts hits and decides which faults happen; used from one thread.

    Args:
        plan: armed at once.
        transport: kind of workers, to refuse faults that they cannot carry out; "": refuse none.
        clock: returns seconds since 1970, for the history.

    Attributes:
        armed: whether any fault can still happen; points check this first.
        history: injected faults, oldest first.

    Raises:
        ConfigError: the plan has a fault that this kind of workers cannot carry out.
    """

    def __init__(
        self,
        plan: FaultPlan | None = None,
        *,
        transport: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.armed = False
        self.history: deque[FiredFault] = deque(maxlen=HISTORY)
        self._transport = transport
        self._clock = clock
        self._counters: list[_FaultCounter] = []
        self._live: list[_FaultCounter] = []
        self._last_number = 0
        if plan is not None:
            self.arm(plan)

    @classmethod
    def from_text(cls, text: str, *, transport: str = "") -> FaultInjector:
        """Return an injector with the plan of ``--faults``.

        Raises:
            ConfigError: the plan is invalid, or a fault cannot happen.
        """
        return cls(FaultPlan.parse(text), transport=transport)

    # --- for users --------------------------------------------------------------------------------

    def arm(self, plan: FaultPlan | str) -> list[ArmedFault]:
        """Arm the faults of another plan; their hits are counted from now on.

        Raises:
            ConfigError: the plan is invalid, or a fault cannot happen; none of it is armed then.
        """
        plan = FaultPlan.parse(plan) if isinstance(plan, str) else plan
        for fault in plan.faults:
            self._check(fault)
        added = [self._counter(index, fault, plan.seed) for index, fault in enumerate(plan.faults)]
        self._counters += added
        self._update()
        return [counter.describe() for counter in added]

    def clear(self) -> list[ArmedFault]:
        """Disarm everything, and return what was armed; the history stays."""
        disarmed, self._counters = [counter.describe() for counter in self._counters], []
        self._update()
        return disarmed

    def describe(self) -> FaultReport:
        """Return all armed faults, including exhausted ones, and the history."""
        return FaultReport([counter.describe() for counter in self._counters], list(self.history))

    # --- for the points ----------------------------------------------------------------------------

    def fire(self, site: FaultSite) -> list[Fault]:
        """Count a hit, and return the faults to carry out, in the order of the plan."""
        if not self.armed:
            return []
        fired = [counter for counter in self._live if counter.hit(site)]
        for counter in fired:
            self._remember(counter, site)
        if fired:
            self._update()
        return [counter.fault for counter in fired]

    def hit(self, point: str) -> None:
        """Hit a point in synchronous code of an actor; ``slow`` and ``hang`` block the thread there.

        Raises:
            FaultInjected: by the action ``raise``.
        """
        if self.armed:
            for fault in self.fire(FaultSite(point)):
                _raise_or(fault, time.sleep)

    async def at(self, point: str) -> None:
        """Hit a point of an actor; return at once, without a checkpoint, unless a fault happens.

        Raises:
            FaultInjected: by the action ``raise``.
        """
        if not self.armed:
            return
        import trio

        for fault in self.fire(FaultSite(point)):
            if fault.action in ("slow", "hang"):
                await trio.sleep(fault.duration or A_LONG_TIME)
            else:
                _raise_or(fault, time.sleep)

    # --- inside ------------------------------------------------------------------------------------

    def _check(self, fault: Fault) -> None:
        try:
            fault.check_transport(self._transport)
        except ConfigError as error:
            raise ConfigError(f"--faults: {str(fault)!r}: {error}") from None

    def _counter(self, index: int, fault: Fault, seed: int) -> _FaultCounter:
        self._last_number += 1
        seed = seed if fault.seed is None else fault.seed
        return _FaultCounter(self._last_number, fault, f"{seed}:{index}")

    def _update(self) -> None:
        self._live = [counter for counter in self._counters if not counter.exhausted]
        self.armed = bool(self._live)

    def _remember(self, counter: _FaultCounter, site: FaultSite) -> None:
        fired = FiredFault(
            counter.number,
            self._clock(),
            site.point,
            counter.fault.action,
            counter.hits,
            site.replica,
            site.rank,
            site.epoch,
            site.message,
        )
        self.history.append(fired)
        fields = {key: value for key, value in msgspec.structs.asdict(fired).items() if value is not None}
        fields["frame"] = fields.pop("message", None)  # a log record has a message of its own
        log.warning("fault injected", **fields)


def _raise_or(fault: Fault, block: Callable[[float], None]) -> None:
    if fault.action == "raise":
        raise FaultInjected(f"raise at {fault.point}")
    block(fault.duration or A_LONG_TIME)
