"""A supervisor's control task: one state machine that handles one event after another.

Events are a child that is ready, has ended or should have been ready by now, the next attempt to start one
that failed, and calls from other tasks. It waits for the end of a child, which has a budget, and never for a
start: meanwhile it hears of everything else.

Children live in a system task's nursery, so that cancelling the scope around the supervisor does not
reach them directly: it asks for the same orderly stop as everything else. It also means that a child
which ignores cancellation can be left behind and reported, where a nursery would wait for it forever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import trio

from ullm.supervision.children import Child, Incarnation
from ullm.supervision.errors import (
    ActorLost,
    RestartLimitReached,
    StartFailed,
    StartTimeout,
    SupervisionError,
)
from ullm.supervision.hooks import call_hook, log_failure
from ullm.supervision.launcher import Launcher
from ullm.supervision.names import tree_names
from ullm.supervision.policy import RestartWindow, should_restart, shuts_down
from ullm.supervision.roster import Roster
from ullm.supervision.shutdown import ChildReport
from ullm.supervision.spec import ChildSpec, ChildStatus, Flags, Hook
from ullm.supervision.starts import Call, Change, Start, Starts
from ullm.supervision.termination import Terminator

R = TypeVar("R")


PATIENCE = 1.0
"""Seconds that the next attempt to start a child waits, at most once, where it would end a sibling that is
being started on request: a child that never starts must not keep others from it."""


class _Retry:
    """The next attempt to start a child that failed.

    Args:
        cause: of the failure.
        counted: whether the failure was counted.
        patient: whether it may wait for siblings, see `PATIENCE`.
    """

    def __init__(self, child: Child, cause: BaseException, *, counted: bool, patient: bool = False) -> None:
        self.child = child
        self.cause = cause
        self.counted = counted
        self.patient = patient


Event = Incarnation | _Retry | Change[Any] | Start


class Control:
    """The state and the rules of one supervisor; `Supervisor` is its public side.

    It has more than 20 methods because one task handles every event, most of them in a few lines.

    Attributes:
        names: the register of the tree that it belongs to.
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
        self.names = tree_names()
        self.roster = Roster(name, flags)
        self.roster.check_all(children)
        self.terminator = Terminator(name, flags.on_abandoned)
        self.body = trio.CancelScope()
        self.ready = trio.Event()
        self.finished = trio.Event()
        self._initial = children
        self._launcher = Launcher(self.roster, self.terminator, self._post)
        self._starts = Starts(self.roster, self._launcher, self.ready)
        self._window = RestartWindow(flags.intensity, flags.period)
        self._send, self._events = trio.open_memory_channel[Event](math.inf)
        self._calls: set[Call[Any]] = set()
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
                add = self.roster.add
                self._starts.ask(*(Start(partial(add, spec), initial=True) for spec in self._initial))
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
            log_failure("supervisor gave up", error, supervisor=self.name)
        if isinstance(error, RestartLimitReached):
            self._call_hook("on_give_up", error.child_id, error)

    async def _handle(self, event: Event) -> None:
        match event:
            case Incarnation():
                await self._handle_change(event)
            case _Retry(child=child) if child.pending is event:
                await self._handle_retry(event)
            case Change():
                await event.carry_out()
            case Start(withdrawn=True):
                await self._starts.take_back(event)
            case Start():
                self._starts.ask(event)

    def _post(self, event: Event) -> None:
        if not self.stopping:
            self._send.send_nowait(event)

    async def call(self, call: Change[R] | Start) -> Any:
        """Have the control task carry out a call, and return its result.

        The cancellation that stops the supervisor may reach it before the caller: then the caller is told of
        the cancellation, not of its consequence.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.stopping:
            raise self._stopping_error()
        self._calls.add(call)
        self._post(call)
        try:
            return await call.reply.wait()
        except SupervisionError:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise
        finally:
            self._calls.discard(call)
            if not call.reply.answered:
                call.withdraw()
                self._post(call)

    def check_start(self) -> None:
        """Check that the calling task may wait for a start.

        Raises:
            StartDeadlock: it is one that starts wait for.
        """
        self._starts.check_caller()

    def request_stop(self, deadline: float = math.inf) -> None:
        """Begin the stop of all children, or hurry it; return at once."""
        self.terminator.expedite(deadline)
        if self.stopping:
            return
        self.stopping = self._launcher.closed = True
        self._work.cancel()
        for call in self._calls:
            call.reply.fail(self._stopping_error())

    def _stopping_error(self) -> ActorLost:
        return ActorLost(f"supervisor {self.name!r} is stopping")

    # --- a child is ready, has ended, or should have been ready ----------------------------------

    async def _handle_change(self, incarnation: Incarnation) -> None:
        child = self.roster.get(incarnation.spec.child_id)
        if child is None or child.incarnation is not incarnation:
            return  # it was ended, and that was dealt with
        starting = child.status is ChildStatus.STARTING
        if starting and incarnation.ready:
            await self._handle_ready(child, incarnation)
        elif incarnation.done.is_set():
            if incarnation.error is not None and not isinstance(incarnation.error, Exception):
                raise incarnation.error  # KeyboardInterrupt, SystemExit: they stop the whole tree in order
            child.stopped()
            if starting:
                self._fail_start(child, incarnation.cause())
            else:
                await self._handle_exit(child, incarnation)
        elif starting and incarnation.overdue:
            await self._launcher.end([child])
            self._fail_start(child, StartTimeout(child.spec.child_id, child.spec.start_timeout))

    async def _handle_ready(self, child: Child, incarnation: Incarnation) -> None:
        if incarnation.declined:
            await self._launcher.end([child])
        else:
            child.status = ChildStatus.RUNNING
        failure = self._starts.go_on_after(child)
        if failure is not None:
            self._call_hook("on_restart", child.spec.child_id, failure)

    def _fail_start(self, child: Child, cause: BaseException) -> None:
        if self._starts.fail(child, cause):
            return
        # Through the queue, so that a child which never starts does not keep others waiting.
        retry = _Retry(child, cause, counted=False, patient=True)
        child.restarting(retry)
        self._post(retry)

    async def _handle_retry(self, retry: _Retry) -> None:
        child, cause = retry.child, retry.cause
        if retry.patient and self._starts.asked_for(self.roster.affected_by(child)):
            self._retry_later(_Retry(child, cause, counted=False), PATIENCE)
        elif retry.counted:
            await self._start_again(child, cause)
        else:
            await self._recover(child, cause)

    async def _handle_exit(self, child: Child, incarnation: Incarnation) -> None:
        if should_restart(child.spec.restart, incarnation.exit_kind):
            await self._recover(child, incarnation.cause())
            return
        if incarnation.error is not None:
            self._report_failure(child, incarnation.error)
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
        self._report_failure(child, cause)
        if not self._window.record(trio.current_time()):
            raise RestartLimitReached(self.name, flags.intensity, flags.period, cause, child_id) from cause
        delay = flags.restart_delay(len(self._window)) if flags.restart_delay is not None else 0.0
        if delay <= 0.0:
            await self._start_again(child, cause)
            return
        await self._end_others(child, cause)
        self._retry_later(_Retry(child, cause, counted=True), delay)

    def _report_failure(self, child: Child, cause: BaseException) -> None:
        log_failure("child failed", cause, supervisor=self.name, child=child.spec.child_id)
        self._call_hook("on_failure", child.spec.child_id, cause)

    def _call_hook(self, name: str, child_id: str, error: BaseException) -> None:
        hook: Hook | None = getattr(self.flags, name)
        call_hook(name, hook, child_id, error, supervisor=self.name, child=child_id)

    def _retry_later(self, retry: _Retry, delay: float) -> None:
        retry.child.restarting(retry)
        self._launcher.nursery.start_soon(self._post_later, retry, delay)

    async def _post_later(self, retry: _Retry, delay: float) -> None:
        await trio.sleep(delay)
        self._post(retry)

    async def _start_again(self, child: Child, cause: BaseException) -> None:
        await self._end_others(child, cause)
        self._starts.restart(self.roster.affected_by(child), cause)

    async def _end_others(self, child: Child, cause: BaseException) -> None:
        """End the children that a failed one affects, those that are being started as well."""
        affected = self.roster.affected_by(child)
        await self._launcher.end_others(child)
        self._starts.overtake(affected, cause)

    # --- what calls ask for --------------------------------------------------------------------

    async def remove(self, child: Child) -> ChildReport | None:
        """End a child; return its report, or None if it did not run."""
        was_up = child.status is ChildStatus.RUNNING
        reports = await self._launcher.end([child])
        self.roster.forget_if_gone_for_good(child)
        self._starts.go_on_after(child)
        return reports[0] if was_up and reports else None

    async def delete_stopped(self, child_id: str) -> None:
        """Forget a child that does not run.

        Raises:
            ChildNotFound, ChildConflict: there is none of this id, or it runs.
        """
        self.roster.forget(self.roster.find_stopped(child_id))
