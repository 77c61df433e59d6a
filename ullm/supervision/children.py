"""A supervised child at run time: its record, and one incarnation after another of its task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from ullm.supervision.actor import Lifetime
from ullm.supervision.errors import ActorLost, root_cause
from ullm.supervision.names import tree_names
from ullm.supervision.policy import ExitKind, Restart
from ullm.supervision.spec import IGNORE, ChildEnd, ChildInfo, ChildSpec, ChildStatus, Kind, Shutdown


class Incarnation:
    """One life of a child: its task, its cancel scope, and how it ended. Also its ``task_status``.

    Args:
        changed: called when the child is ready, and when its task has ended.

    Attributes:
        settled: set when the child is ready, or has ended before that.
        overdue: whether the time for its start was over before it was ready.
        done: set when its task has ended.
        error: the exception that ended it, if there was one.
    """

    __slots__ = (
        "_changed",
        "_names",
        "done",
        "error",
        "exit_kind",
        "lifetime",
        "overdue",
        "ready",
        "scope",
        "settled",
        "spec",
        "value",
    )

    def __init__(self, spec: ChildSpec, changed: Callable[[Incarnation], None]) -> None:
        self.spec = spec
        self.scope = trio.CancelScope()
        self.lifetime = Lifetime(spec.child_id)
        self.ready = self.overdue = False
        self.value: Any = None
        self.settled = trio.Event()
        self.done = trio.Event()
        self.exit_kind = ExitKind.NORMAL
        self.error: BaseException | None = None
        self._changed = changed
        self._names = tree_names()

    def started(self, value: Any = None) -> None:
        """Mark the child as ready."""
        if self.ready:
            raise RuntimeError(f"child {self.spec.child_id!r} called task_status.started() twice")
        if self.spec.name is not None and value is not IGNORE:
            self._names.register(self.spec.name, self, value)
        self.ready = True
        self.lifetime.holds_up_siblings = False
        self.value = value
        self.settled.set()
        self._changed(self)

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
            self.release_name()
            self.done.set()
            self.settled.set()
            self._changed(self)

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

    def release_name(self) -> None:
        """Leave its name to the next incarnation, also if this one is abandoned."""
        if self.spec.name is not None:
            self._names.release(self.spec.name, self)

    def end(self) -> ChildEnd:
        """Return how it has ended."""
        return ChildEnd(self.spec.child_id, self.exit_kind, self.error)

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
        failure: what it is being restarted for; None otherwise.
    """

    __slots__ = ("failure", "incarnation", "pending", "restarts", "spec", "status")

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.status = ChildStatus.STOPPED
        self.incarnation: Incarnation | None = None
        self.restarts = 0
        self.pending: object | None = None
        self.failure: BaseException | None = None

    def begin(self, changed: Callable[[Incarnation], None]) -> Incarnation:
        """Return a new incarnation, which the caller runs."""
        self.status = ChildStatus.STARTING
        self.pending = None
        self.incarnation = Incarnation(self.spec, changed)
        return self.incarnation

    def stopped(self) -> None:
        """Record that it does not run and will not be started by itself."""
        self.status = ChildStatus.STOPPED
        self.pending = None
        if self.incarnation is not None:
            self.incarnation.release_name()
        self.incarnation = None

    def restarting(self, event: object | None = None) -> None:
        """Record that it is going to be started again: when ``event`` comes, or after a sibling."""
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
