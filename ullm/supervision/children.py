"""A supervised child at run time: its record, and one incarnation after another of its task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from ullm.errors import ActorLost
from ullm.supervision.actor import Lifetime
from ullm.supervision.policy import ExitKind, Restart
from ullm.supervision.spec import IGNORE, ChildInfo, ChildSpec, ChildStatus, Kind, Shutdown


def root_cause(error: BaseException) -> BaseException:
    """What is inside of nested groups of one exception each."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def describe(error: BaseException) -> str:
    """One line: the class and the first line of the message."""
    error = root_cause(error)
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


class Incarnation:
    """One life of a child: its task, its cancel scope, and how it ended. Also its ``task_status``.

    Args:
        ended: called when the task has ended.
    """

    __slots__ = (
        "_ended",
        "done",
        "error",
        "exit_kind",
        "lifetime",
        "ready",
        "scope",
        "settled",
        "spec",
        "value",
    )

    def __init__(self, spec: ChildSpec, ended: Callable[[Incarnation], None]) -> None:
        self.spec = spec
        self.scope = trio.CancelScope()
        self.lifetime = Lifetime(spec.child_id)
        self.ready = False
        self.value: Any = None
        self.settled = trio.Event()
        """Set when the child is ready, or has ended before that."""
        self.done = trio.Event()
        self.exit_kind = ExitKind.NORMAL
        self.error: BaseException | None = None
        self._ended = ended

    def started(self, value: Any = None) -> None:
        """The child is ready."""
        if self.ready:
            raise RuntimeError(f"child {self.spec.child_id!r} called task_status.started() twice")
        self.ready = True
        self.value = value
        self.settled.set()

    async def run(self) -> None:
        """Run the child to its end; never raises what the child raised."""
        try:
            with self.lifetime.running(), self.scope:
                await self.spec.run(task_status=self)
            self.exit_kind = ExitKind.SHUTDOWN if self.scope.cancel_called else ExitKind.NORMAL
        except trio.Cancelled:  # the run ends, and this child was abandoned long ago
            raise
        except BaseException as error:  # the supervisor decides, also about KeyboardInterrupt
            self._classify(error)
        finally:
            self.done.set()
            self.settled.set()
            self._ended(self)

    def _classify(self, error: BaseException) -> None:
        others = error.split(Shutdown)[1] if isinstance(error, BaseExceptionGroup) else error
        if others is None or isinstance(others, Shutdown):
            self.exit_kind = ExitKind.SHUTDOWN
        else:
            self.exit_kind, self.error = ExitKind.ABNORMAL, root_cause(others)

    @property
    def declined(self) -> bool:
        """Whether the child said that it has nothing to do."""
        return self.value is IGNORE

    def cause(self) -> BaseException:
        """Why it ended, as an exception, also where it just returned."""
        if self.error is not None:
            return self.error
        return ActorLost("ended" if self.ready else "ended before it was ready")


class Child:
    """A supervisor's record of one child."""

    __slots__ = ("incarnation", "pending", "restarts", "spec", "status")

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.status = ChildStatus.STOPPED
        self.incarnation: Incarnation | None = None
        self.restarts = 0
        self.pending: object | None = None
        """The only event that may still bring about the child's next attempt to start."""

    def begin(self, ended: Callable[[Incarnation], None]) -> Incarnation:
        """A new incarnation, to be run by the caller."""
        self.status = ChildStatus.STARTING
        self.pending = None
        self.incarnation = Incarnation(self.spec, ended)
        return self.incarnation

    def stopped(self) -> None:
        """It does not run, and nothing will start it by itself."""
        self.status = ChildStatus.STOPPED
        self.pending = None
        self.incarnation = None

    def restarting(self, event: object | None = None) -> None:
        """It failed; ``event`` is going to bring about the next attempt."""
        self.stopped()
        self.status = ChildStatus.RESTARTING
        self.pending = event

    @property
    def temporary(self) -> bool:
        """Whether it is forgotten when it has ended."""
        return self.spec.restart is Restart.TEMPORARY

    def info(self) -> ChildInfo:
        """The child as a frozen value."""
        value: Any = self.incarnation.value if self.incarnation is not None else None
        supervises = self.spec.kind is Kind.SUPERVISOR and value is not None and value is not IGNORE
        return ChildInfo(
            child_id=self.spec.child_id,
            status=self.status,
            kind=self.spec.kind,
            restart=self.spec.restart,
            significant=self.spec.significant,
            restarts=self.restarts,
            value=value,
            children=value.which_children() if supervises else (),
        )
