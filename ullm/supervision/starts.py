"""The children that are being started: those that somebody asked for, and those that the restart rule starts.

Nothing here waits. The control task begins a start, goes on with its other events, and comes back when the
child is ready or has failed, so that a start that takes long keeps nobody else from being heard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import trio

from ullm.supervision.actor import Reply, current_lifetime
from ullm.supervision.children import Child
from ullm.supervision.errors import StartDeadlock, StartFailed, SupervisionError
from ullm.supervision.launcher import Launcher
from ullm.supervision.roster import Roster
from ullm.supervision.spec import ChildInfo

R = TypeVar("R")


class Call(Generic[R]):
    """Something that another task wants of the control task, and the place for its answer."""

    def __init__(self) -> None:
        self.reply: Reply[R] = Reply()
        self.withdrawn = False

    def withdraw(self) -> None:
        """Note that nobody waits for it any more."""
        self.withdrawn = True


class Change(Call[R]):
    """A change that the control task carries out at once."""

    def __init__(self, operation: Callable[[], Awaitable[R]]) -> None:
        super().__init__()
        self._operation = operation
        self._scope = trio.CancelScope()

    def withdraw(self) -> None:
        """Cancel the operation, if it is not done."""
        super().withdraw()
        self._scope.cancel()

    async def carry_out(self) -> None:
        """Do it, and answer."""
        if self.reply.answered or self.withdrawn:
            return
        with self._scope:
            try:
                self.reply.send(await self._operation())
            except SupervisionError as error:
                self.reply.fail(error)


class Start(Call[ChildInfo]):
    """A start that was asked for: initial ones come one after another, then all others side by side.

    Args:
        take: returns the child when it is its turn.
        kept: whether the child is kept if it fails.
        initial: whether the supervisor itself asked for it, which does not come up without it.

    Attributes:
        child: None before its turn.
    """

    def __init__(self, take: Callable[[], Child], *, kept: bool = False, initial: bool = False) -> None:
        super().__init__()
        self.take = take
        self.kept = kept
        self.initial = initial
        self.child: Child | None = None


class Starts:
    """What is being started, and who waits for it.

    Args:
        roster: the supervisor's children.
        launcher: begins and ends them.
        ready: set as soon as no initial start is left.
    """

    def __init__(self, roster: Roster, launcher: Launcher, ready: trio.Event) -> None:
        self._roster = roster
        self._launcher = launcher
        self._ready = ready
        self._waiting: deque[Start] = deque()
        self._begun: list[Start] = []
        self._restarts: list[list[Child]] = []
        """Each begins with the child that is being started; the others follow it."""

    def ask(self, *starts: Start) -> None:
        """Begin these starts when it is their turn."""
        self._waiting.extend(starts)
        self._begin_next()

    def restart(self, children: Sequence[Child], cause: BaseException) -> None:
        """Start children again by rule, one after another, beside whatever else is being started."""
        for child in children:
            child.restarting()
            child.failure = cause
        self._restarts.append(list(children))
        self._launcher.begin(children[0])

    def go_on_after(self, child: Child) -> BaseException | None:
        """Go on after a child that is up, has declined, or was terminated.

        Returns:
            The failure for which it was restarted; None if it was not, or does not run.
        """
        restarted = any(child in restart for restart in self._restarts) and child.incarnation is not None
        failure, child.failure = child.failure, None
        for restart in self._restarts:
            if child in restart:
                was_first = restart[0] is child
                restart.remove(child)
                child.restarts += child.incarnation is not None
                if was_first and restart:
                    self._launcher.begin(restart[0])
        self._restarts = [restart for restart in self._restarts if restart]
        start = self._begun_for(child)
        if start is not None:
            self._begun.remove(start)
            start.reply.send(child.info())
            if child.incarnation is None:
                self._roster.forget_if_gone_for_good(child)
            self._begin_next()
        return failure if restarted else None

    def fail(self, child: Child, cause: BaseException) -> bool:
        """Tell whoever asked for a child that it failed to start; return False if it was the restart rule.

        Raises:
            StartFailed: the supervisor itself asked for it.
        """
        start = self._begun_for(child)
        if start is not None:
            self._fail_asked(start, cause)
            return True
        for restart in [restart for restart in self._restarts if restart[0] is child]:
            self._restarts.remove(restart)
            for other in restart[1:]:
                other.stopped()
        return False

    def overtake(self, ended: Sequence[Child], cause: BaseException) -> None:
        """Drop the starts of children that were ended with a sibling, which failed for this cause.

        Raises:
            StartFailed: the supervisor itself asked for one of them.
        """
        self._restarts = [restart for restart in self._restarts if restart[0] not in ended]
        for start in [start for start in self._begun if start.child in ended]:
            self._fail_asked(start, cause)

    def asked_for(self, children: Sequence[Child]) -> bool:
        """Return whether one of these is being started because somebody asked for it."""
        return any(start.child in children for start in self._begun)

    async def take_back(self, start: Start) -> None:
        """End the child of a start whose caller has left."""
        if start in self._waiting:
            self._waiting.remove(start)
        elif start in self._begun and start.child is not None:
            self._begun.remove(start)
            await self._launcher.end([start.child])
            if not start.kept:
                self._roster.forget(start.child)
            self._begin_next()

    def check_caller(self) -> None:
        """Check that the task which asks for a start is not one that all further starts wait for.

        Initial starts come one after another and before all others, so a child whose own task, before it is
        ready, waits for another start would wait for itself. A task beside it may do so.

        Raises:
            StartDeadlock: it is.
        """
        initial = self._begun[0].child if self._begun and self._begun[0].initial else None
        lifetime = current_lifetime()
        if initial is None or lifetime is None or lifetime.task is not trio.lowlevel.current_task():
            return
        while lifetime is not None and lifetime.holds_up_siblings:
            if initial.incarnation is not None and lifetime is initial.incarnation.lifetime:
                raise StartDeadlock(self._roster.name, initial.spec.child_id)
            lifetime = lifetime.parent

    def _begun_for(self, child: Child) -> Start | None:
        """Return the start of a child that was asked for and is being started."""
        return next((start for start in self._begun if start.child is child), None)

    def _fail_asked(self, start: Start, cause: BaseException) -> None:
        self._begun.remove(start)
        assert start.child is not None, "it was being started"
        error = StartFailed(start.child.spec.child_id, cause)
        if start.initial:
            raise error from cause
        start.reply.fail(error)
        if not start.kept:
            self._roster.forget(start.child)
        self._begin_next()

    def _begin_next(self) -> None:
        while self._waiting and not any(start.initial for start in self._begun):
            start = self._waiting.popleft()
            try:
                start.child = start.take()
            except SupervisionError as error:
                start.reply.fail(error)
            else:
                self._begun.append(start)
                self._launcher.begin(start.child)
                if start.initial and start.child.incarnation is not None:
                    start.child.incarnation.lifetime.holds_up_siblings = True
        if not any(start.initial for start in (*self._begun, *self._waiting)):
            self._ready.set()
