"""A supervised child at run time: its record, and one incarnation after another of its task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from ullm.supervision.actor import Lifetime
from ullm.supervision.errors import ActorLost, root_cause
from ullm.supervision.policy import ExitKind, Restart
from ullm.supervision.spec import IGNORE, ChildInfo, ChildSpec, ChildStatus, Kind, Shutdown


class Incarnation:
    """One life of a child: its task, its cancel scope, and how it ended. Also its ``task_status``.

    Args:
        ended: called when the task has ended.

    Attributes:
        settled: set when the child is ready, or has ended before that.
        done: set when its task has ended.
        error: the exception that ended it, if there was one.
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
        self.done = trio.Event()
        self.exit_kind = ExitKind.NORMAL
        self.error: BaseException | None = None
        self._ended = ended

    def started(self, value: Any = None) -> None:
        """Mark the child as ready."""
        if self.ready:
            raise RuntimeError(f"child {self.spec.child_id!r} called task_status.started() twice")
        self.ready = True
        self.value = value
        self.settled.set()

    async def run(self) -> None:
        """Run the child to its end; an exception of the child is kept in `error`, not raised."""
        try:
            with self.lifetime.running(), self.scope:
                await self.spec.run(task_status=self)
            self.exit_kind = ExitKind.SHUTDOWN if self.scope.cancel_called else ExitKind.NORMAL
        except trio.Cancelled:  # the whole run ends, and this child was abandoned long ago
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
        """Whether the child has nothing to do and said so with `IGNORE`."""
        return self.value is IGNORE

    def cause(self) -> BaseException:
        """Return the reason for its end as an exception, even if it just returned."""
        if self.error is not None:
            return self.error
        return ActorLost("ended" if self.ready else "ended before it was ready")


class Child:
    """A supervisor's record of one child.

    Attributes:
        incarnation: the present one; None if the child does not run.
        pending: the only event that may still cause the next attempt to start it.
    """

    __slots__ = ("incarnation", "pending", "restarts", "spec", "status")

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.status = ChildStatus.STOPPED
        self.incarnation: Incarnation | None = None
        self.restarts = 0
        self.pending: object | None = None

    def begin(self, ended: Callable[[Incarnation], None]) -> Incarnation:
        """Return a new incarnation, which the caller runs."""
        self.status = ChildStatus.STARTING
        self.pending = None
        self.incarnation = Incarnation(self.spec, ended)
        return self.incarnation

    def stopped(self) -> None:
        """Record that it does not run and will not be started by itself."""
        self.status = ChildStatus.STOPPED
        self.pending = None
        self.incarnation = None

    def restarting(self, event: object | None = None) -> None:
        """Record that it failed, and that ``event`` is going to cause the next attempt."""
        self.stopped()
        self.status = ChildStatus.RESTARTING
        self.pending = event

    @property
    def temporary(self) -> bool:
        """Whether it is forgotten when it has ended."""
        return self.spec.restart is Restart.TEMPORARY

    def info(self) -> ChildInfo:
        """Return the child as a frozen value."""
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
