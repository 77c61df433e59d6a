"""Restart decisions on plain values, as in Erlang/OTP's supervisor, without I/O or a clock."""

from __future__ import annotations

import enum
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence


class Strategy(enum.StrEnum):
    """The choice of the children that are restarted when one of them fails.

    ``DYNAMIC`` is one_for_one for many similar children that come and go: they are started at run time,
    stopped all at once, and forgotten when they have ended; their ids are made unique.
    """

    ONE_FOR_ONE = "one_for_one"
    ONE_FOR_ALL = "one_for_all"
    REST_FOR_ONE = "rest_for_one"
    DYNAMIC = "dynamic"


class Restart(enum.StrEnum):
    """The condition for another start of a child that ended: always, only after a failure, or never."""

    PERMANENT = "permanent"
    TRANSIENT = "transient"
    TEMPORARY = "temporary"


class AutoShutdown(enum.StrEnum):
    """The condition for the stop of a supervisor whose significant children have ended by themselves."""

    NEVER = "never"
    ANY_SIGNIFICANT = "any_significant"
    ALL_SIGNIFICANT = "all_significant"


class ExitKind(enum.StrEnum):
    """The end of a child: it returned; it was stopped or raised `Shutdown`; it raised anything else."""

    NORMAL = "normal"
    SHUTDOWN = "shutdown"
    ABNORMAL = "abnormal"


def should_restart(restart: Restart, exit_kind: ExitKind) -> bool:
    """Return whether a child that ended this way is started again."""
    if restart is Restart.TRANSIENT:
        return exit_kind is ExitKind.ABNORMAL
    return restart is Restart.PERMANENT


def affected(strategy: Strategy, child_ids: Iterable[str], failed: str) -> Sequence[str]:
    """Return the children to stop and start again with ``failed``, itself included, in order of start.

    Args:
        child_ids: all children in order of start.
    """
    if strategy is Strategy.ONE_FOR_ALL:
        return tuple(child_ids)
    if strategy is Strategy.REST_FOR_ONE:
        return tuple(itertools.dropwhile(lambda child_id: child_id != failed, child_ids))
    return (failed,)


def shuts_down(mode: AutoShutdown, significant: bool, others_active: Callable[[], bool]) -> bool:
    """Return whether the end of a child, which is not started again, stops its supervisor.

    Args:
        significant: whether the child that ended is significant.
        others_active: returns whether another significant child runs or is about to be restarted.
    """
    if mode is AutoShutdown.NEVER or not significant:
        return False
    return mode is AutoShutdown.ANY_SIGNIFICANT or not others_active()


class RestartWindow:
    """A count of restarts in a sliding window.

    Args:
        intensity: restarts allowed within one period; 0 allows none.
        period: seconds.
    """

    def __init__(self, intensity: float, period: float) -> None:
        self.intensity = intensity
        self.period = period
        self._times: deque[float] = deque()

    def record(self, now: float) -> bool:
        """Count a restart at ``now`` and return whether it is still allowed; amortized O(1)."""
        self._times.append(now)
        while self._times[0] < now - self.period:
            self._times.popleft()
        return len(self._times) <= self.intensity

    def __len__(self) -> int:
        """Return the number of restarts in the window that ends with the last one."""
        return len(self._times)


def exponential_backoff(first: float, most: float, factor: float = 2.0) -> Callable[[int], float]:
    """Return a restart delay: ``first`` seconds, then ``factor`` times the one before, at most ``most``.

    The function that is returned takes the number of restarts, from 1 on, and returns seconds.
    """

    def delay(restarts: int) -> float:
        # The exponent is bounded so that a long series of restarts cannot overflow a float.
        return min(most, first * factor ** min(restarts - 1, 64))

    return delay
