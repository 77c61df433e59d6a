"""Values that describe children: how to run one, and what became of it."""

from __future__ import annotations

import enum
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import trio

from ullm.errors import ConfigError
from ullm.supervision.policy import AutoShutdown, Restart, Strategy
from ullm.supervision.shutdown import INFINITY, ChildReport


class Shutdown(Exception):
    """A child raises this to end on purpose; to the restart policy it is as good as returning."""


class _Ignore:
    """The type of `IGNORE`."""

    def __repr__(self) -> str:
        return "IGNORE"


IGNORE: Final = _Ignore()
"""``task_status.started(IGNORE)``: the child has nothing to do; it is not running, and that is no error."""


class ChildFunction(Protocol):
    """What a child runs."""

    def __call__(self, *, task_status: trio.TaskStatus[Any]) -> Awaitable[object]:
        """Set up, call ``task_status.started(value)`` when ready, and go on until cancelled."""


class Kind(enum.StrEnum):
    """What a child is."""

    WORKER = "worker"
    SUPERVISOR = "supervisor"


@dataclass(frozen=True)
class Flags:
    """How a supervisor treats its children.

    Args:
        intensity: restarts within ``period`` that do not make the supervisor give up.
        period: seconds.
        restart_delay: seconds to wait before a restart, given the number of restarts within the
            current period, this one included; None: no waiting.
        on_abandoned: called with the report of a child that could not be ended.

    Raises:
        ConfigError: a value that makes no sense.
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
            raise ConfigError(f"intensity must be at least 0, got {self.intensity}")
        if not self.period > 0:
            raise ConfigError(f"period must be more than 0 seconds, got {self.period}")


@dataclass(frozen=True)
class ChildSpec:
    """How to run one child.

    Args:
        child_id: unique among its siblings.
        run: an async function that takes ``task_status``; use `functools.partial` for arguments.
        restart: when to start it again.
        shutdown: seconds from the request to stop until ``kill`` is called; `INFINITY`, `BRUTAL_KILL`.
        kill: ends by force what the child's task cannot end by itself (a process, a thread that
            reads a flag); synchronous and quick.
        significant: its own end may stop the supervisor; see `AutoShutdown`.
        kind: SUPERVISOR if it runs one and passes it to ``task_status.started``.

    Raises:
        ConfigError: a value that makes no sense, alone or beside another.
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
            raise ConfigError(f"child {self.child_id!r}: run must be an async function, got {self.run!r}")
        if math.isnan(self.shutdown) or self.shutdown < 0:
            raise ConfigError(
                f"child {self.child_id!r}: shutdown must be 0 or more seconds, got {self.shutdown}"
            )
        if self.significant and self.restart is Restart.PERMANENT:
            raise ConfigError(
                f"child {self.child_id!r} is significant, so it must be transient or temporary, not permanent"
            )

    @staticmethod
    def supervisor(
        child_id: str,
        children: Sequence[ChildSpec] = (),
        *,
        strategy: Strategy = Strategy.ONE_FOR_ONE,
        intensity: float = 1,
        period: float = 5.0,
        auto_shutdown: AutoShutdown = AutoShutdown.NEVER,
        restart_delay: Callable[[int], float] | None = None,
        on_abandoned: Callable[[ChildReport], None] | None = None,
        restart: Restart = Restart.PERMANENT,
        shutdown: float = INFINITY,
        significant: bool = False,
    ) -> ChildSpec:
        """A child that is itself a supervisor; the arguments are those of `open_supervisor`."""
        from ullm.supervision.supervisor import SupervisorChild  # it builds on this module

        flags = Flags(strategy, intensity, period, auto_shutdown, restart_delay, on_abandoned)
        run = SupervisorChild(child_id, tuple(children), flags)
        return ChildSpec(child_id, run, restart, shutdown, None, significant, Kind.SUPERVISOR)


class ChildStatus(enum.StrEnum):
    """Where a child is in its life; RESTARTING: it failed and waits for its next attempt to start."""

    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass(frozen=True)
class ChildInfo:
    """One child as it is now.

    Args:
        value: what it passed to ``task_status.started``; None if it does not run.
        restarts: how many times it was started again.
        children: of a running supervisor, in order of start.
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
    """How many children a supervisor has.

    Args:
        specs: all of them, whether they run or not.
        active: those that run or are being started.
        restarting: those that failed and wait for their next attempt.
        supervisors: of ``specs``.
        workers: of ``specs``.
    """

    specs: int
    active: int
    restarting: int
    supervisors: int
    workers: int
