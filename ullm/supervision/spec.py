"""Plain values that describe children: how to run them, and how they are now."""

from __future__ import annotations

import enum
import inspect
import math
import os
import signal
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import trio

from ullm.supervision.errors import InvalidSpec
from ullm.supervision.policy import AutoShutdown, ExitKind, Restart, Strategy
from ullm.supervision.process import ProcessFunction
from ullm.supervision.shutdown import INFINITY, ChildReport


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


Hook = Callable[[str, BaseException], object]
"""A function that a supervisor calls with the id of a child and an exception."""


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
        on_failure: called when a child has failed, before anything is done about it.
        on_restart: called when a child is up again after the failure, its own or a sibling's, that is passed.
        on_give_up: called with the child that failed last and the `RestartLimitReached`.
        max_children: the number of children that are kept, running or not; `INFINITY` for no limit.

    Raises:
        InvalidSpec: a value makes no sense.
    """

    strategy: Strategy = Strategy.ONE_FOR_ONE
    intensity: float = 1
    period: float = 5.0
    auto_shutdown: AutoShutdown = AutoShutdown.NEVER
    restart_delay: Callable[[int], float] | None = None
    on_abandoned: Callable[[ChildReport], None] | None = None
    on_failure: Hook | None = None
    on_restart: Hook | None = None
    on_give_up: Hook | None = None
    max_children: float = INFINITY

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", Strategy(self.strategy))
        object.__setattr__(self, "auto_shutdown", AutoShutdown(self.auto_shutdown))
        if not self.intensity >= 0:
            raise InvalidSpec(f"intensity must be at least 0, got {self.intensity}")
        if not self.period > 0:
            raise InvalidSpec(f"period must be more than 0 seconds, got {self.period}")
        if not self.max_children >= 0:
            raise InvalidSpec(f"max_children must be at least 0, got {self.max_children}")
        for name in ("on_abandoned", "on_failure", "on_restart", "on_give_up"):
            hook = getattr(self, name)
            if hook is not None and (not callable(hook) or inspect.iscoroutinefunction(hook)):
                raise InvalidSpec(f"{name} must be a function that is not async, got {hook!r}")


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
        start_timeout: seconds until it must be ready, else its start has failed; `INFINITY` for no limit.
        name: unique in the whole tree; while the child is up, `whereis` returns its value by it.

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
    start_timeout: float = INFINITY
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "restart", Restart(self.restart))
        object.__setattr__(self, "kind", Kind(self.kind))
        if not callable(self.run):
            raise InvalidSpec(f"child {self.child_id!r}: run must be an async function, got {self.run!r}")
        if math.isnan(self.shutdown) or self.shutdown < 0:
            raise InvalidSpec(
                f"child {self.child_id!r}: shutdown must be 0 or more seconds, got {self.shutdown}"
            )
        if not self.start_timeout > 0:
            got = f"got {self.start_timeout}"
            raise InvalidSpec(f"child {self.child_id!r}: start_timeout must be more than 0 seconds, {got}")
        if self.significant and self.restart is Restart.PERMANENT:
            raise InvalidSpec(
                f"child {self.child_id!r} is significant, so it must be transient or temporary, not permanent"
            )

    @classmethod
    def process(
        cls,
        child_id: str,
        command: Sequence[str],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        exit_codes: Collection[int] = (0,),
        ready_line: str | None = None,
        **options: Any,
    ) -> ChildSpec:
        """Return the specification of a child that is a process.

        Its value is the `trio.Process`, which has ``pid`` and ``send_signal``. It gets no input, and its
        lines are logged as info. It is in a process group of its own.

        Args:
            command: the program and its arguments, without a shell.
            cwd: its working folder; None: the present one.
            env: all its environment variables; None: those of this process.
            stop_signal: what asks it to stop; after ``shutdown`` seconds it is killed with its group.
            exit_codes: those that are a normal end; any other one is a `ProcessFailed`.
            ready_line: it is ready when it has written a line that contains this; None: when it runs.
            options: those of `ChildSpec` after ``run``, but for ``kill`` and ``kind``.

        Raises:
            InvalidSpec: a value makes no sense.
        """
        if isinstance(command, str) or not command:
            raise InvalidSpec(f"child {child_id!r}: command must be a list of arguments, got {command!r}")
        if not {"kill", "kind"}.isdisjoint(options):
            raise InvalidSpec(f"child {child_id!r}: a process takes neither kill nor kind")
        run = ProcessFunction(child_id, command, cwd, env, stop_signal, exit_codes, ready_line)
        return cls(child_id, run, **options)


class ChildStatus(enum.StrEnum):
    """The stages of a child's life; RESTARTING: it failed, or ended with a sibling that failed,
    and waits for its next attempt to start."""

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
class ChildEnd:
    """The end of a child's task, as `Supervisor.monitor` returns it.

    Args:
        kind: NORMAL if it returned, SHUTDOWN if it was stopped or raised `Shutdown`, ABNORMAL otherwise.
        error: the exception, if there was one.
    """

    child_id: str
    kind: ExitKind
    error: BaseException | None


@dataclass(frozen=True)
class ChildCounts:
    """The numbers of a supervisor's children.

    Args:
        specs: all of them, whether they run or not.
        active: those that run or are being started.
        restarting: those that wait to be started again.
        supervisors: supervisors among ``specs``.
        workers: workers among ``specs``.
    """

    specs: int
    active: int
    restarting: int
    supervisors: int
    workers: int
