"""The injector: counts hits, and decides which faults happen."""

from __future__ import annotations

import random
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

from ullm.errors import ConfigError
from ullm.faults.effects import A_LONG_TIME, Firing, Losses, carry_out, carry_out_now, note_overtaken
from ullm.faults.history import HISTORY, ArmedFault, FaultReport, FaultSite, FiredFault
from ullm.faults.plan import Fault, FaultPlan
from ullm.faults.points import POINTS
from ullm.logs import get_logger

log = get_logger(__name__)

__all__ = [
    "A_LONG_TIME",
    "HISTORY",
    "ArmedFault",
    "FaultInjector",
    "FaultReport",
    "FaultSite",
    "FiredFault",
    "Firing",
]


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

    def hit(self, site: FaultSite, *, ended: bool) -> bool:
        """Count a hit; return whether the fault happens: one that ends cannot once another has ended it."""
        fault = self.fault
        if self.exhausted or not _concerns(fault, site):
            return False
        self.hits += 1
        if self.hits < fault.nth or (ended and fault.ends):
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
    return (
        fault.point == site.point
        and all(
            expected is None or expected == actual
            for expected, actual in (
                (fault.replica, site.replica),
                (fault.rank, site.rank),
                (fault.epoch, site.epoch),
                (fault.message, site.message),
            )
        )
        and ((fault.request is None and fault.token is None) or _match(fault, site) is not None)
    )


def _match(fault: Fault, site: FaultSite) -> tuple[str, int | None] | None:
    """Return the token of the site that the fault is meant for."""
    for request, first, last in site.tokens:
        if fault.concerns(request) and (fault.token is None or first <= fault.token <= last):
            return request, fault.token
    return None


class FaultInjector:
    """Counts hits and decides which faults happen; used from one thread.

    Args:
        plan: armed at once.
        transport: kind of workers, to refuse faults that they cannot carry out; "": refuse none.
        clock: returns the time for the history; default: the virtual clock's, where trio runs on one, and
            otherwise the seconds since 1970.
        own: take faults at points of other programs, see `ullm.faults.point`, and not at ullm's.

    Attributes:
        armed: whether any fault can still happen.
        watching: whether points have to ask: one can, or one that has happened waits for its effect.
        history: injected faults, oldest first.
        find_request: returns the id and the number of prompt tokens of a sequence that a step has; set by
            the router.

    Raises:
        ConfigError: the plan has a fault that cannot happen here.
    """

    def __init__(
        self,
        plan: FaultPlan | None = None,
        *,
        transport: str = "",
        clock: Callable[[], float] | None = None,
        own: bool = False,
    ) -> None:
        self.armed = self.watching = False
        self.history: deque[FiredFault] = deque(maxlen=HISTORY)
        self.find_request: Callable[[int], tuple[str, int] | None] = _nobody
        self._transport = transport
        self._clock = clock or now
        self._own = own
        self._counters: list[_FaultCounter] = []
        self._live: list[_FaultCounter] = []
        self._losses = Losses(self._clock)
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

    def fire(self, site: FaultSite) -> list[Firing]:
        """Count a hit, and return the faults to carry out, in the order of the plan but what ends last."""
        if not self.watching:
            return []
        self._losses.note_hit(site.point)
        fired: list[_FaultCounter] = []
        for counter in self._live:
            if counter.hit(site, ended=any(each.fault.ends for each in fired)):
                fired.append(counter)
        fired.sort(key=lambda counter: counter.fault.ends)
        firings = [Firing(counter.fault, self._remember(counter, site)) for counter in fired]
        self._update()
        return firings

    def hits(self, point: str, *, request: str = "", token: int | None = None) -> list[Firing]:
        """Count a hit of a point that concerns one request, or none, as `fire` does."""
        return self.fire(_site(point, request, token)) if self.watching else []

    def note_loss(self, replica: int, rank: int, epoch: int, cause: str) -> None:
        """Record that a worker has ended otherwise than in order: the effect of its faults, if it had any."""
        self._losses.note_loss(replica, rank, epoch, cause)

    def note_stop(self, replica: int, rank: int, epoch: int) -> None:
        """Record that a worker has ended in order: a fault may have fired just before, and come too late."""
        self._losses.note_stop(replica, rank, epoch)
        self._update()

    def note_start(self, replica: int, rank: int, epoch: int) -> None:
        """Record that a worker is ready: those that were lost in its place before have a successor."""
        self._losses.note_start(replica, rank, epoch)
        self._update()

    def hit(self, point: str, *, request: str = "", token: int | None = None) -> None:
        """Hit a point in synchronous code; ``slow`` and ``hang`` block the thread there.

        Raises:
            FaultInjected: by the action ``raise``.
            OSError: by ``disk_full``.
        """
        if self.watching:
            firings = self.fire(_site(point, request, token))
            with note_overtaken(firings):
                for firing in firings:
                    carry_out_now(firing)

    async def at(
        self,
        point: str,
        *,
        request: str = "",
        token: int | None = None,
        tokens: Callable[[], Sequence[tuple[str, int, int]]] | None = None,
    ) -> None:
        """Hit a point of an actor; return at once, without a checkpoint, unless a fault happens.

        Args:
            tokens: returns what the hit concerns, if that is several tokens: as in `FaultSite`.

        Raises:
            FaultInjected: by the action ``raise``.
            OSError: by ``disk_full``.
        """
        if not self.watching:
            return
        site = FaultSite(point, tokens=tuple(tokens())) if tokens else _site(point, request, token)
        firings = self.fire(site)
        with note_overtaken(firings):
            for firing in firings:
                await carry_out(firing)

    # --- inside ------------------------------------------------------------------------------------

    def _check(self, fault: Fault) -> None:
        try:
            if fault.is_own is not self._own:
                raise ConfigError(
                    f"{fault.point} is a point of ullm, which this program does not have"
                    if self._own
                    else f"no point {fault.point!r}; there are {', '.join(POINTS)}"
                )
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
        self.watching = self.armed or bool(self._losses)

    def _remember(self, counter: _FaultCounter, site: FaultSite) -> FiredFault:
        # Of several requests, only the one that a fault is tied to is its own.
        tied = counter.fault.request is not None or counter.fault.token is not None or len(site.tokens) == 1
        request, token = (_match(counter.fault, site) if tied else None) or (None, None)
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
            request or None,
            token,
        )
        self.history.append(fired)
        self._losses.expect(fired, counter.fault)
        fields = {key: value for key, value in fired.facts().items() if value is not None and value != ""}
        fields["frame"] = fields.pop("message", None)  # a log record has a message of its own
        log.warning("fault injected", **fields)
        return fired


def _site(point: str, request: str, token: int | None) -> FaultSite:
    if not request and token is None:
        return FaultSite(point)
    return FaultSite(point, tokens=((request, token or 0, token or 0),))


def _nobody(seq_id: int) -> None:
    return None


def now() -> float:
    """Return the time of a test on a virtual clock; otherwise the seconds since 1970."""
    testing = sys.modules.get("trio.testing")  # who has not imported it has no virtual clock
    if testing is not None:
        import trio

        if trio.lowlevel.in_trio_run() and isinstance(trio.lowlevel.current_clock(), testing.MockClock):
            return trio.current_time()
    return time.time()
