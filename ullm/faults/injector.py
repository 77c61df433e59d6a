"""The one place that counts hits and decides which faults happen."""

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
"""Firings that are remembered."""

A_LONG_TIME = 1e9
"""Seconds; stands for ever where a finite number is needed."""

log = get_logger("ullm.faults")


class ArmedFault(msgspec.Struct, frozen=True):
    """A fault of the plan, and how far it is.

    Args:
        number: counted from 1, in the order in which faults were armed.
        fault: in the language of plans.
        hits: of its point, by what it does not filter out.
        fired: times that it happened.
        remaining: times that it may still happen; None: without end.
    """

    number: int
    fault: str
    hits: int
    fired: int
    remaining: int | None


class FiredFault(msgspec.Struct, frozen=True):
    """Something that was made to go wrong.

    Args:
        number: of its `ArmedFault`.
        at: seconds since 1970.
        hit: the how many-th of its point it was.
        replica, rank, epoch: of the worker, where it concerned one.
        message: type of the frame, where it concerned one.
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
    """What `FaultInjector.describe` says.

    Args:
        fired: the last `HISTORY` of them, oldest first.
    """

    armed: list[ArmedFault]
    fired: list[FiredFault]


@dataclass(frozen=True, slots=True)
class FaultSite:
    """Who hits a point; None: it is of no one worker, or no frame."""

    point: str
    replica: int | None = None
    rank: int | None = None
    epoch: int | None = None
    message: str | None = None


class _Counter:
    """One armed fault. Its draws depend on seed, index and hit only, so nothing else moves them."""

    def __init__(self, number: int, fault: Fault, seed: str) -> None:
        self.number = number
        self.fault = fault
        self.hits = self.fired = 0
        self._seed = seed

    @property
    def exhausted(self) -> bool:
        return self.fired >= self.fault.limit

    def hit(self, site: FaultSite) -> bool:
        """Count, and decide."""
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
        wanted is None or wanted == found
        for wanted, found in (
            (fault.replica, site.replica),
            (fault.rank, site.rank),
            (fault.epoch, site.epoch),
            (fault.message, site.message),
        )
    )


class FaultInjector:
    """Counts hits and decides; used from one thread.

    Args:
        plan: armed at once.
        transport: what workers are, to refuse what they cannot do to themselves; "": anything goes.
        clock: seconds, for the history.

    Attributes:
        armed: whether anything can happen; nobody needs to ask further where it is not.
        history: what happened, oldest first.

    Raises:
        ConfigError: the plan has a fault that this transport cannot have.
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
        self._counters: list[_Counter] = []
        self._live: list[_Counter] = []
        self._last_number = 0
        if plan is not None:
            self.arm(plan)

    @classmethod
    def from_text(cls, text: str, *, transport: str = "") -> FaultInjector:
        """With the plan that ``--faults`` gives.

        Raises:
            ConfigError: it cannot be read, or cannot happen.
        """
        return cls(FaultPlan.parse(text), transport=transport)

    # --- for whoever wants faults ------------------------------------------------------------------

    def arm(self, plan: FaultPlan | str) -> list[ArmedFault]:
        """Add a plan to what is armed; its hits are counted from now on.

        Raises:
            ConfigError: it cannot be read, or cannot happen; nothing of it is armed then.
        """
        plan = FaultPlan.parse(plan) if isinstance(plan, str) else plan
        for fault in plan.faults:
            self._check(fault)
        added = [self._counter(index, fault, plan.seed) for index, fault in enumerate(plan.faults)]
        self._counters += added
        self._update()
        return [counter.describe() for counter in added]

    def clear(self) -> list[ArmedFault]:
        """Disarm everything; the history stays. Returns what was armed."""
        found, self._counters = [counter.describe() for counter in self._counters], []
        self._update()
        return found

    def describe(self) -> FaultReport:
        """All that is armed, exhausted faults included, and all that has happened."""
        return FaultReport([counter.describe() for counter in self._counters], list(self.history))

    # --- for the points ----------------------------------------------------------------------------

    def fire(self, site: FaultSite) -> list[Fault]:
        """Count a hit, and return what shall go wrong with it, in the order of the plan."""
        if not self.armed:
            return []
        found = [counter for counter in self._live if counter.hit(site)]
        for counter in found:
            self._remember(counter, site)
        if found:
            self._update()
        return [counter.fault for counter in found]

    def hit(self, point: str) -> None:
        """A point of an actor that cannot wait: what would hang or be slow there blocks the thread.

        Raises:
            FaultInjected: the plan says so.
        """
        if self.armed:
            for fault in self.fire(FaultSite(point)):
                _raise_or(fault, time.sleep)

    async def at(self, point: str) -> None:
        """A point of an actor; returns at once, without a checkpoint, unless the plan says otherwise.

        Raises:
            FaultInjected: the plan says so.
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

    def _counter(self, index: int, fault: Fault, seed: int) -> _Counter:
        self._last_number += 1
        seed = seed if fault.seed is None else fault.seed
        return _Counter(self._last_number, fault, f"{seed}:{index}")

    def _update(self) -> None:
        self._live = [counter for counter in self._counters if not counter.exhausted]
        self.armed = bool(self._live)

    def _remember(self, counter: _Counter, site: FaultSite) -> None:
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
        said = {key: value for key, value in msgspec.structs.asdict(fired).items() if value is not None}
        said["frame"] = said.pop("message", None)  # a log record has a message of its own
        log.warning("fault injected", **said)


def _raise_or(fault: Fault, block: Callable[[float], None]) -> None:
    if fault.action == "raise":
        raise FaultInjected(f"raise at {fault.point}")
    block(fault.duration or A_LONG_TIME)
