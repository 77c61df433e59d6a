"""Plain values that describe children: how to run them, and how they are now."""

from __future__ import annotations

import enum
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import trio

from ullm.supervision.errors import InvalidSpec
from ullm.supervision.policy import AutoShutdown, Restart, Strategy
from ullm.supervision.shutdown import ChildReport


class Shutdown(Exception):
    """Raised by a child that ends on purpose; the restart policy treats it like a return."""


class _Ignore:
    """The type of `IGNORE`."""

    def __repr__(self) -> str:
        return "IGNORE"


IGNORE: Final = _Ignore()
"""``task_status.started(IGNORE)``: the child has nothing to do. It does not run, and that is no error."""


class ChildFunction(Protocol):
    """The async function that a child runs."""

    def __call__(self, *, task_status: trio.TaskStatus[Any]) -> Awaitable[object]:
        """Set up, call ``task_status.started(value)`` when ready, and go on until cancelled."""


class Kind(enum.StrEnum):
    """The kinds of children: those that do the work, and those that supervise others."""

    WORKER = "worker"
    SUPERVISOR = "supervisor"


@dataclass(frozen=True)
class Flags:
    """A supervisor's options for the treatment of its children.

    Args:
        intensity: restarts within ``period`` that do not make the supervisor give up.
        period: seconds.
        restart_delay: returns the seconds to wait before a restart, given the number of restarts within
            the current period, this one included; None: no delay.
        on_abandoned: called with the report of a child that could not be ended.

    Raises:
        InvalidSpec: a value makes no sense.
    """

    strategy: Strategy = Strategy.ONE_FOR_ONE
    intensity: float = 1
    period: float = 5.0
    auto_shutdown: AutoShutdown = AutoShutdown.NEVER
    restart_delay: Callable[[int], float] | None = None
    on_abandoned: Callable[[ChildReport], None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", Strategy(self.strategy))
        object.__setattr__(self, "auto_shutdown", AutoShutdown(self.auto_shutdown))
        if not self.intensity >= 0:
            raise InvalidSpec(f"intensity must be at least 0, got {self.intensity}")
        if not self.period > 0:
            raise InvalidSpec(f"period must be more than 0 seconds, got {self.period}")


@dataclass(frozen=True)
class ChildSpec:
    """The specification of one child; `supervisor_child` makes that of a child which is itself a supervisor.

    Args:
        child_id: unique among its siblings.
        run: an async function that takes ``task_status``; use `functools.partial` for arguments.
        restart: when to start it again.
        shutdown: seconds from the request to stop until ``kill`` is called; `INFINITY`, `BRUTAL_KILL`.
        kill: ends by force what the child's task cannot end by itself (a process, a thread that
            reads a flag); synchronous and quick.
        significant: whether its own end may stop the supervisor; see `AutoShutdown`.
        kind: SUPERVISOR if it runs one and passes it to ``task_status.started``.

    Raises:
        InvalidSpec: a value makes no sense, alone or beside another.
    """

    child_id: str
    run: ChildFunction
    restart: Restart = Restart.PERMANENT
    shutdown: float = 5.0
    kill: Callable[[], None] | None = None
    significant: bool = False
    kind: Kind = Kind.WORKER

    def __post_init__(self) -> None:
        object.__setattr__(self, "restart", Restart(self.restart))
        object.__setattr__(self, "kind", Kind(self.kind))
        if not callable(self.run):
            raise InvalidSpec(f"child {self.child_id!r}: run must be an async function, got {self.run!r}")
        if math.isnan(self.shutdown) or self.shutdown < 0:
            raise InvalidSpec(
                f"child {self.child_id!r}: shutdown must be 0 or more seconds, got {self.shutdown}"
            )
        if self.significant and self.restart is Restart.PERMANENT:
            raise InvalidSpec(
                f"child {self.child_id!r} is significant, so it must be transient or temporary, not permanent"
            )


class ChildStatus(enum.StrEnum):
    """The stages of a child's life; RESTARTING: it failed and waits for its next attempt to start."""

    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass(frozen=True)
class ChildInfo:
    """One child as it is now.

    Args:
        value: the argument of its ``task_status.started``; None if it does not run.
        restarts: how many times it was started again.
        children: those of a running supervisor, in order of start.
    """

    child_id: str
    status: ChildStatus
    kind: Kind
    restart: Restart
    significant: bool
    restarts: int
    value: Any = field(default=None, compare=False)
    children: tuple[ChildInfo, ...] = ()


@dataclass(frozen=True)
class ChildCounts:
    """The numbers of a supervisor's children.

    Args:
        specs: all of them, whether they run or not.
        active: those that run or are being started.
        restarting: those that failed and wait for their next attempt.
        supervisors: supervisors among ``specs``.
        workers: workers among ``specs``.
    """

    specs: int
    active: int
    restarting: int
    supervisors: int
    workers: int
