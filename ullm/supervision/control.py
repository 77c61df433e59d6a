"""A supervisor's control task: one state machine that handles one event after another.

Events are the end of a child, the next attempt to start one that failed, and calls from other tasks.
Children live in a system task's nursery, so that cancelling the scope around the supervisor does not
reach them directly: it asks for the same orderly stop as everything else. It also means that a child
which ignores cancellation can be left behind and reported, where a nursery would wait for it forever.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import trio

from ullm.supervision.children import Child, Incarnation
from ullm.supervision.errors import (
    ActorLost,
    RestartLimitReached,
    StartFailed,
    SupervisionError,
    describe,
)
from ullm.supervision.launcher import Launcher, raise_fatal
from ullm.supervision.policy import RestartWindow, should_restart, shuts_down
from ullm.supervision.roster import Roster
from ullm.supervision.shutdown import ChildReport
from ullm.supervision.spec import ChildInfo, ChildSpec, ChildStatus, Flags
from ullm.supervision.termination import Terminator

log = logging.getLogger("ullm.supervision")
R = TypeVar("R")


class _Call(Generic[R]):
    """An operation that another task wants the control task to carry out."""

    def __init__(self, operation: Callable[[], Awaitable[R]]) -> None:
        self.operation = operation
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.result: R | None = None
        self.error: SupervisionError | None = None

    def fail(self, error: SupervisionError) -> None:
        if not self.done.is_set():
            self.error = error
            self.done.set()

    async def serve(self) -> None:
        if self.done.is_set() or self.scope.cancel_called:
            return
        with self.scope:
            try:
                self.result = await self.operation()
            except SupervisionError as error:
                self.fail(error)
            self.done.set()


class _Retry:
    """The next attempt to start a child that failed.

    Args:
        cause: set if the last attempt failed as well, which counts as another failure.
    """

    def __init__(self, child: Child, cause: BaseException | None = None) -> None:
        self.child = child
        self.cause = cause


class Control:
    """The state and the rules of one supervisor; `Supervisor` is its public side.

    Attributes:
        body: the scope around the body of `open_supervisor`; cancelled when the supervisor ends by itself.
        ready: set when all initial children have started, or one of them failed.
        finished: set when all children have been stopped.
    """

    def __init__(self, name: str, children: Sequence[ChildSpec], flags: Flags) -> None:
        self.name = name
        self.flags = flags
        self.failure: BaseException | None = None
        self.reports: tuple[ChildReport, ...] = ()
        self.stopping = False
        self.auto_stopped = False
        self.roster = Roster(name, flags)
        self.roster.check_all(children)
        self.terminator = Terminator(name, flags.on_abandoned)
        self.body = trio.CancelScope()
        self.ready = trio.Event()
        self.finished = trio.Event()
        self._initial = children
        self._launcher = Launcher(self.roster, self.terminator, self._post)
        self._window = RestartWindow(flags.intensity, flags.period)
        self._send, self._events = trio.open_memory_channel[Incarnation | _Retry | _Call[Any]](math.inf)
        self._calls: set[_Call[Any]] = set()
        self._work = trio.CancelScope()

    async def host(self) -> None:
        """Run as a system task, which must not raise, for as long as abandoned children do."""
        async with trio.open_nursery() as nursery:
            self._launcher.nursery = nursery
            await self._run()
            nursery.cancel_scope.cancel()

    async def _run(self) -> None:
        try:
            with self._work:
                for spec in self._initial:
                    await self.add(spec)
                self.ready.set()
                async for event in self._events:
                    await self._handle(event)
        except BaseException as error:  # raised again by open_supervisor, when the tree is down
            self._fail(error)
        self.request_stop()
        self.reports = await self._launcher.end_all()
        self.finished.set()
        self.ready.set()

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.body.cancel()
        if not isinstance(error, StartFailed):  # open_supervisor raises that one, and nothing has run yet
            log.warning(
                "supervisor gave up  supervisor=%(supervisor)s cause=%(cause)s",
                {"supervisor": self.name, "cause": describe(error)},
            )

    async def _handle(self, event: Incarnation | _Retry | _Call[Any]) -> None:
        match event:
            case Incarnation():
                await self._handle_exit(event)
            case _Retry(child=child, cause=cause) if child.pending is event:
                await (self._start_again(child) if cause is None else self._recover(child, cause))
            case _Call():
                await event.serve()

    def _post(self, event: Incarnation | _Retry | _Call[Any]) -> None:
        if not self.stopping:
            self._send.send_nowait(event)

    async def call(self, operation: Callable[[], Awaitable[R]]) -> R:
        """Have the control task carry out ``operation``, and return its result.

        The cancellation that stops the supervisor may reach it before the caller: then the caller is told of
        the cancellation, not of its consequence.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.stopping:
            raise ActorLost(f"supervisor {self.name!r} is stopping")
        call = _Call(operation)
        self._calls.add(call)
        self._post(call)
        try:
            await call.done.wait()
        finally:
            self._calls.discard(call)
            call.scope.cancel()
        if call.error is not None:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise call.error
        return cast(R, call.result)

    def request_stop(self, deadline: float = math.inf) -> None:
        """Begin the stop of all children, or hurry it; return at once."""
        self.terminator.expedite(deadline)
        if self.stopping:
            return
        self.stopping = True
        self._work.cancel()
        for call in self._calls:
            call.fail(ActorLost(f"supervisor {self.name!r} is stopping"))

    # --- a child has ended ---------------------------------------------------------------------

    async def _handle_exit(self, incarnation: Incarnation) -> None:
        child = self.roster.get(incarnation.spec.child_id)
        if child is None or child.incarnation is not incarnation:
            return  # it was stopped, or failed to start, and that was dealt with
        raise_fatal(incarnation)
        child.stopped()
        if should_restart(child.spec.restart, incarnation.exit_kind):
            await self._recover(child, incarnation.cause())
            return
        if incarnation.error is not None:
            self._log_failure(child, incarnation.error)
        self.roster.forget_if_gone_for_good(child)
        if shuts_down(self.flags.auto_shutdown, child.spec.significant, self.roster.significant_active):
            self.auto_stopped = True
            self.body.cancel()
            self.request_stop()

    async def _recover(self, child: Child, cause: BaseException) -> None:
        """Count a failure, stop the children that it affects, start them again now or later.

        Raises:
            RestartLimitReached: there were too many failures.
        """
        child_id, flags = child.spec.child_id, self.flags
        child.restarting()
        self._log_failure(child, cause)
        if not self._window.record(trio.current_time()):
            raise RestartLimitReached(self.name, flags.intensity, flags.period, cause, child_id) from cause
        delay = flags.restart_delay(len(self._window)) if flags.restart_delay is not None else 0.0
        if delay <= 0.0:
            await self._start_again(child)
            return
        await self._launcher.end_others(child)
        retry = _Retry(child)
        child.restarting(retry)
        self._launcher.nursery.start_soon(self._post_later, retry, delay)

    def _log_failure(self, child: Child, cause: BaseException) -> None:
        log.warning(
            "child failed  supervisor=%(supervisor)s child=%(child)s cause=%(cause)s",
            {"supervisor": self.name, "child": child.spec.child_id, "cause": describe(cause)},
        )

    async def _post_later(self, retry: _Retry, delay: float) -> None:
        await trio.sleep(delay)
        self._post(retry)

    async def _start_again(self, child: Child) -> None:
        await self._launcher.end_others(child)
        for each in self.roster.affected_by(child):
            try:
                await self._launcher.start(each)
            except StartFailed as error:
                # Through the queue, so that a child which never starts does not keep others waiting.
                if child.status is ChildStatus.RESTARTING:
                    child.stopped()
                retry = _Retry(each, error.cause)
                each.restarting(retry)
                self._post(retry)
                return
            each.restarts += each.incarnation is not None

    # --- changes by calls ----------------------------------------------------------------------

    async def add(self, spec: ChildSpec) -> ChildInfo:
        """Add a child and start it.

        Raises:
            ChildConflict: there is a child of this id.
            StartFailed: it failed, and is not kept.
        """
        child = self.roster.add(spec)
        try:
            await self._launcher.start(child)
        except BaseException:
            if not self.stopping:  # otherwise the stop ends it
                await self._launcher.end([child])
                self.roster.forget(child)
            raise
        info = child.info()
        if child.incarnation is None:
            self.roster.forget_if_gone_for_good(child)
        return info

    async def remove(self, child: Child) -> ChildReport | None:
        """End a child; return its report, or None if it did not run."""
        reports = await self._launcher.end([child])
        self.roster.forget_if_gone_for_good(child)
        return reports[0] if reports else None

    async def start_stopped(self, child_id: str) -> ChildInfo:
        """Start a child that does not run.

        Raises:
            ChildNotFound, ChildConflict: there is none of this id, or it runs.
            StartFailed: it failed, and stays stopped.
        """
        child = self.roster.find_stopped(child_id)
        try:
            await self._launcher.start(child)
        except trio.Cancelled:
            if not self.stopping:
                await self._launcher.end([child])
            raise
        return child.info()

    async def delete_stopped(self, child_id: str) -> None:
        """Forget a child that does not run.

        Raises:
            ChildNotFound, ChildConflict: there is none of this id, or it runs.
        """
        self.roster.forget(self.roster.find_stopped(child_id))
