"""The supervisor: Erlang/OTP's semantics as one control task that handles one event after another.

Its children live in a system task's nursery, so that cancelling the surrounding scope does not reach
them directly: it asks for the same orderly stop as everything else. It also means that a child which
ignores cancellation can be left behind and reported, where a nursery would wait for it forever.
Longer than 300 lines, because the rules of starting, restarting and stopping are one state machine.
"""

from __future__ import annotations

import contextvars
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar, cast

import trio

from ullm.actors.base import current_lifetime
from ullm.errors import (
    ActorLost,
    ChildConflict,
    ChildNotFound,
    ConfigError,
    RestartLimitReached,
    StartFailed,
    UllmError,
)
from ullm.logs import get_logger
from ullm.supervision.children import Child, Incarnation, describe
from ullm.supervision.policy import (
    AutoShutdown,
    RestartWindow,
    Strategy,
    affected,
    should_restart,
    shuts_down,
)
from ullm.supervision.shutdown import ChildReport
from ullm.supervision.spec import ChildCounts, ChildInfo, ChildSpec, ChildStatus, Flags, Kind
from ullm.supervision.termination import Terminator

log = get_logger("ullm.supervision")
R = TypeVar("R")


class _Call(Generic[R]):
    """Something that another task wants the control task to do."""

    def __init__(self, operation: Callable[[], Awaitable[R]]) -> None:
        self.operation = operation
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.result: R | None = None
        self.error: UllmError | None = None

    def fail(self, error: UllmError) -> None:
        if not self.done.is_set():
            self.error = error
            self.done.set()

    async def serve(self) -> None:
        if self.done.is_set() or self.scope.cancel_called:
            return
        with self.scope:
            try:
                self.result = await self.operation()
            except UllmError as error:
                self.fail(error)
            self.done.set()


class _Retry:
    """Start a child again that failed; ``cause`` is set if this is a new failure, which counts."""

    def __init__(self, child: Child, cause: BaseException | None = None) -> None:
        self.child = child
        self.cause = cause


class Supervisor:
    """A running supervisor; `open_supervisor` makes one.

    Reading (`which_children`, `count_children`, `get_childspec`) answers at once, also while a child is
    being started. Changes are made one after another by the control task; cancelling the caller of one
    takes it back if it is not done yet.
    """

    def __init__(self, name: str, children: Iterable[ChildSpec], flags: Flags) -> None:
        self.name = name
        self.flags = flags
        self.failure: BaseException | None = None
        """Why it gave up; None if it did not."""
        self.auto_stopped = False
        """Whether it stopped because its significant children had ended."""
        self.reports: tuple[ChildReport, ...] = ()
        """How the children were stopped, in the order in which they were; empty until then."""
        self._children: dict[str, Child] = {}
        self._initial = tuple(children)
        self._window = RestartWindow(flags.intensity, flags.period)
        self._terminator = Terminator(name, flags.on_abandoned)
        self._send, self._events = trio.open_memory_channel[Incarnation | _Retry | _Call[Any]](math.inf)
        self._calls: set[_Call[Any]] = set()
        self._work = trio.CancelScope()
        self._body = trio.CancelScope()
        self._ready = trio.Event()
        self._finished = trio.Event()
        self._nursery: trio.Nursery
        self._serial = 0
        self.stopping = False
        """Whether a stop was asked for, or a failure has begun one."""

    def __repr__(self) -> str:
        state = "stopped" if self._finished.is_set() else "stopping" if self.stopping else "running"
        return f"<Supervisor {self.name!r} {state}, {len(self._children)} children>"

    # --- reading -------------------------------------------------------------------------------

    def which_children(self) -> tuple[ChildInfo, ...]:
        """The children in order of start, those of nested supervisors within them."""
        return tuple(child.info() for child in self._children.values())

    def count_children(self) -> ChildCounts:
        """How many there are, restarting ones included."""
        children = self._children.values()
        supervisors = sum(child.spec.kind is Kind.SUPERVISOR for child in children)
        return ChildCounts(
            specs=len(children),
            active=sum(child.incarnation is not None for child in children),
            restarting=sum(child.status is ChildStatus.RESTARTING for child in children),
            supervisors=supervisors,
            workers=len(children) - supervisors,
        )

    def get_childspec(self, child_id: str) -> ChildSpec:
        """The specification of a child.

        Raises:
            ChildNotFound: there is no such child.
        """
        return self._find(child_id).spec

    # --- changing ------------------------------------------------------------------------------

    async def start_child(self, spec: ChildSpec) -> ChildInfo:
        """Add a child and start it; returns when it is ready.

        Under the dynamic strategy the returned ``child_id`` is the given one with a number.

        Raises:
            StartFailed: it failed; the specification is not kept.
            ChildConflict: there is a child of this id.
            ActorLost: the supervisor is stopping.
        """
        self._check(spec)
        return await self._call(partial(self._add, spec))

    async def terminate_child(self, child_id: str) -> ChildReport | None:
        """Stop a child, also one that is being started or waits to be restarted; None if it did not run.

        Its specification is kept for `restart_child`, unless it is temporary or dynamic.

        Raises:
            ChildNotFound: there is no such child.
            ActorLost: the supervisor is stopping.
        """
        child = self._find(child_id)
        if child.status is ChildStatus.STARTING and child.incarnation is not None:
            child.incarnation.scope.cancel()  # a start that hangs must not keep the control task
        return await self._call(partial(self._remove, child))

    async def restart_child(self, child_id: str) -> ChildInfo:
        """Start a child again that was terminated or has ended.

        Raises:
            StartFailed: it failed; it stays stopped.
            ChildNotFound: there is no such child.
            ChildConflict: it runs, or is being restarted.
            ActorLost: the supervisor is stopping.
        """
        return await self._call(partial(self._start_stopped, child_id))

    async def delete_child(self, child_id: str) -> None:
        """Forget a child that does not run.

        Raises:
            ChildNotFound: there is no such child.
            ChildConflict: it runs, or is being restarted.
            ActorLost: the supervisor is stopping.
        """
        await self._call(partial(self._delete_stopped, child_id))

    # --- stopping ------------------------------------------------------------------------------

    async def stop(self, deadline: float = math.inf) -> tuple[ChildReport, ...]:
        """Stop all children in reverse order of start, then the supervisor; returns how that went.

        Args:
            deadline: absolute, in trio's time. Each child has its own budget within it. A further call
                with an earlier deadline tightens it.
        """
        self.request_stop(deadline)
        await self.wait_stopped()
        return self.reports

    def request_stop(self, deadline: float = math.inf) -> None:
        """What `stop` does, without waiting for it."""
        self._terminator.expedite(deadline)
        if self.stopping:
            return
        self.stopping = True
        self._work.cancel()
        for call in self._calls:
            call.fail(ActorLost(f"supervisor {self.name!r} is stopping"))

    def kill(self) -> None:
        """Stop with force: no budget for anyone, kill hooks at once."""
        self.request_stop(-math.inf)

    async def wait_stopped(self) -> None:
        """Wait until the supervisor and its children have stopped, for whatever reason."""
        await self._finished.wait()

    # --- the control task ----------------------------------------------------------------------

    async def _host(self) -> None:
        """A system task; it must not raise, and stays as long as abandoned children do."""
        async with trio.open_nursery() as self._nursery:
            await self._control()
            self._nursery.cancel_scope.cancel()

    async def _control(self) -> None:
        try:
            with self._work:
                await self._start_initial()
                self._ready.set()
                async for event in self._events:
                    await self._handle(event)
        except BaseException as error:  # raised again by open_supervisor, when the tree is down
            self._fail(error)
        self.request_stop()
        self.reports = await self._stop_all()
        self._finished.set()
        self._ready.set()

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self._body.cancel()
        if not isinstance(error, StartFailed):  # whoever starts it hears of that one, once
            log.error("supervisor gave up", supervisor=self.name, cause=describe(error))

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

    async def _call(self, operation: Callable[[], Awaitable[R]]) -> R:
        """Have the control task do it."""
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
            raise call.error
        return cast(R, call.result)

    # --- starting ------------------------------------------------------------------------------

    def _check(self, spec: ChildSpec) -> None:
        if spec.significant and self.flags.auto_shutdown is AutoShutdown.NEVER:
            raise ConfigError(
                f"child {spec.child_id!r} is significant, but {self.name!r} has auto_shutdown never"
            )

    def _check_initial(self) -> None:
        ids = Counter(spec.child_id for spec in self._initial)
        for child_id, number in ids.items():
            if number > 1 and self.flags.strategy is not Strategy.DYNAMIC:
                raise ConfigError(f"supervisor {self.name!r} has {number} children called {child_id!r}")
        for spec in self._initial:
            self._check(spec)

    async def _start_initial(self) -> None:
        for spec in self._initial:
            await self._add(spec)

    async def _add(self, spec: ChildSpec) -> ChildInfo:
        child = Child(self._with_unique_id(spec))
        self._children[child.spec.child_id] = child
        try:
            await self._start(child)
        except BaseException:
            if not self.stopping:  # else the stop ends what was begun here
                await self._terminate([child])
                self._forget(child)
            raise
        info = child.info()
        if child.incarnation is None:
            self._forget_if_gone_for_good(child)
        return info

    def _with_unique_id(self, spec: ChildSpec) -> ChildSpec:
        if self.flags.strategy is Strategy.DYNAMIC:
            self._serial += 1
            return replace(spec, child_id=f"{spec.child_id}#{self._serial}")
        if spec.child_id in self._children:
            raise ChildConflict(self.name, spec.child_id, self._children[spec.child_id].status)
        return spec

    async def _start(self, child: Child) -> None:
        """Start it and wait until it is ready, declines, or fails.

        Raises:
            StartFailed: it failed; the child is left stopped.
        """
        incarnation = child.begin(self._post)
        self._nursery.start_soon(incarnation.run, name=f"{self.name}/{child.spec.child_id}")
        await incarnation.settled.wait()
        if not incarnation.ready:
            child.stopped()
            self._raise_fatal(incarnation)
            if not incarnation.scope.cancel_called:  # else terminate_child did not let it become ready
                raise StartFailed(child.spec.child_id, incarnation.cause()) from incarnation.error
        elif incarnation.declined:
            await self._terminate([child])
        else:
            child.status = ChildStatus.RUNNING

    def _raise_fatal(self, incarnation: Incarnation) -> None:
        """KeyboardInterrupt and SystemExit stop the whole tree in order; nothing is restarted."""
        if incarnation.error is not None and not isinstance(incarnation.error, Exception):
            raise incarnation.error

    # --- a child has ended ---------------------------------------------------------------------

    async def _handle_exit(self, incarnation: Incarnation) -> None:
        child = self._children.get(incarnation.spec.child_id)
        if child is None or child.incarnation is not incarnation:
            return  # it was stopped, or failed to start, and that was dealt with
        self._raise_fatal(incarnation)
        child.stopped()
        if should_restart(child.spec.restart, incarnation.exit_kind):
            await self._recover(child, incarnation.cause())
            return
        if incarnation.error is not None:
            log.warning(
                "child failed",
                supervisor=self.name,
                child=child.spec.child_id,
                cause=describe(incarnation.error),
            )
        self._forget_if_gone_for_good(child)
        if shuts_down(self.flags.auto_shutdown, child.spec.significant, self._significant_active):
            self.auto_stopped = True
            self._body.cancel()
            self.request_stop()

    def _significant_active(self) -> bool:
        return any(
            child.spec.significant and child.status is not ChildStatus.STOPPED
            for child in self._children.values()
        )

    async def _recover(self, child: Child, cause: BaseException) -> None:
        """Count a failure, stop the children that it affects, start them again now or later.

        Raises:
            RestartLimitReached: there were too many of them.
        """
        child_id, flags = child.spec.child_id, self.flags
        child.restarting()
        log.warning("child failed", supervisor=self.name, child=child_id, cause=describe(cause))
        if not self._window.record(trio.current_time()):
            raise RestartLimitReached(self.name, flags.intensity, flags.period, cause, child_id) from cause
        delay = flags.restart_delay(len(self._window)) if flags.restart_delay is not None else 0.0
        if delay <= 0.0:
            await self._start_again(child)
            return
        await self._stop_affected(child)
        retry = _Retry(child)
        child.restarting(retry)
        self._nursery.start_soon(self._post_later, retry, delay)

    async def _post_later(self, retry: _Retry, delay: float) -> None:
        await trio.sleep(delay)
        self._post(retry)

    async def _start_again(self, child: Child) -> None:
        await self._stop_affected(child)
        for each in self._affected(child):
            try:
                await self._start(each)
            except StartFailed as error:
                # Through the queue, so that a child which never starts does not keep others waiting.
                if child.status is ChildStatus.RESTARTING:
                    child.stopped()
                retry = _Retry(each, error.cause)
                each.restarting(retry)
                self._post(retry)
                return
            each.restarts += each.incarnation is not None

    def _affected(self, child: Child) -> list[Child]:
        ids = affected(self.flags.strategy, self._children, child.spec.child_id)
        return [self._children[child_id] for child_id in ids]

    async def _stop_affected(self, child: Child) -> None:
        """Stop the others in reverse order; temporary ones are not going to be started again."""
        for each in reversed(self._affected(child)):
            if each is child:
                continue
            await self._terminate([each])
            if each.temporary:
                self._forget(each)

    # --- changes -------------------------------------------------------------------------------

    def _find(self, child_id: str) -> Child:
        try:
            return self._children[child_id]
        except KeyError:
            raise ChildNotFound(self.name, child_id) from None

    def _find_stopped(self, child_id: str) -> Child:
        child = self._find(child_id)
        if child.status is not ChildStatus.STOPPED:
            raise ChildConflict(self.name, child_id, child.status)
        return child

    async def _remove(self, child: Child) -> ChildReport | None:
        reports = await self._terminate([child])
        self._forget_if_gone_for_good(child)
        return reports[0] if reports else None

    async def _start_stopped(self, child_id: str) -> ChildInfo:
        child = self._find_stopped(child_id)
        try:
            await self._start(child)
        except trio.Cancelled:
            if not self.stopping:
                await self._terminate([child])
            raise
        return child.info()

    async def _delete_stopped(self, child_id: str) -> None:
        self._forget(self._find_stopped(child_id))

    def _forget_if_gone_for_good(self, child: Child) -> None:
        if child.temporary or self.flags.strategy is Strategy.DYNAMIC:
            self._forget(child)

    def _forget(self, child: Child) -> None:
        self._children.pop(child.spec.child_id, None)

    # --- ending children -----------------------------------------------------------------------

    async def _terminate(
        self, children: Sequence[Child], later: float = 0.0, unlimited: int = 0
    ) -> list[ChildReport]:
        """End those of ``children`` that run, all at once, and report on them."""
        running = [child.incarnation for child in children if child.incarnation is not None]
        reports = await self._terminator.stop(running, later, unlimited)
        for child in children:
            child.stopped()
        return reports

    async def _stop_all(self) -> tuple[ChildReport, ...]:
        """End all children in reverse order; what is left at the deadline, all at once."""
        left = [child for child in self._children.values() if child.incarnation is not None]
        later = sum(child.spec.shutdown for child in left if math.isfinite(child.spec.shutdown))
        unlimited = sum(math.isinf(child.spec.shutdown) for child in left)
        earlier = self._terminator.abandoned()
        reports: list[ChildReport] = []
        while (
            left
            and self.flags.strategy is not Strategy.DYNAMIC
            and trio.current_time() < self._terminator.deadline
        ):
            child = left.pop()
            if math.isinf(child.spec.shutdown):
                unlimited -= 1
            else:
                later -= child.spec.shutdown
            reports += await self._terminate([child], later, unlimited)
        reports += await self._terminate(left[::-1])
        return (*reports, *earlier)


@asynccontextmanager
async def open_supervisor(
    name: str,
    children: Iterable[ChildSpec] = (),
    *,
    strategy: Strategy = Strategy.ONE_FOR_ONE,
    intensity: float = 1,
    period: float = 5.0,
    auto_shutdown: AutoShutdown = AutoShutdown.NEVER,
    restart_delay: Callable[[int], float] | None = None,
    on_abandoned: Callable[[ChildReport], None] | None = None,
    shutdown_timeout: float = math.inf,
    on_cancelled: Callable[[Supervisor], None] | None = None,
) -> AsyncIterator[Supervisor]:
    """Start children in order, run the body, stop the children in reverse order.

    Leaving the body stops the tree, and so does cancelling the surrounding scope, without waiting for
    the body. If the supervisor gives up, the body is cancelled and the failure raised; if it stops
    because of ``auto_shutdown``, the body is cancelled and the block left without an exception.

    Args:
        name: for logs and error messages.
        strategy: which children are restarted when one of them fails.
        intensity: restarts within ``period`` seconds that do not make it give up.
        auto_shutdown: whether to stop when significant children have ended.
        restart_delay: seconds to wait before a restart, given how many there were within the current
            period, this one included; see `exponential_backoff`.
        on_abandoned: called with the report of a child that could not be ended.
        shutdown_timeout: seconds for the whole stop when the body is left or cancelled, counted from
            then; within a supervised child, its own stop deadline holds as well.
        on_cancelled: called when the surrounding scope is cancelled, in place of stopping at once, by a
            program that has something to do before; the body must then end by itself.

    Raises:
        StartFailed: a child did not become ready; those before it were stopped.
        RestartLimitReached: children failed too often.
        ConfigError: values that make no sense.
    """
    flags = Flags(strategy, intensity, period, auto_shutdown, restart_delay, on_abandoned)
    async with _opened(Supervisor(name, children, flags), shutdown_timeout, on_cancelled) as supervisor:
        yield supervisor


@asynccontextmanager
async def _opened(
    supervisor: Supervisor, shutdown_timeout: float, on_cancelled: Callable[[Supervisor], None] | None
) -> AsyncIterator[Supervisor]:
    def leave() -> None:
        supervisor.request_stop(trio.current_time() + shutdown_timeout)

    async def watch() -> None:
        try:
            await supervisor.wait_stopped()
        except trio.Cancelled:  # ends this task, which is all that cancelling it is about
            if not supervisor.stopping:
                on_cancelled(supervisor) if on_cancelled is not None else leave()
        watched.set()

    watched = trio.Event()
    supervisor._check_initial()
    lifetime = current_lifetime()
    error: BaseException | None = None
    with lifetime.followed_by(supervisor._terminator.expedite) if lifetime is not None else nullcontext():
        async with trio.open_nursery() as guard:
            guard.start_soon(watch)
            trio.lowlevel.spawn_system_task(
                supervisor._host, name=f"supervisor {supervisor.name}", context=contextvars.copy_context()
            )
            try:
                await supervisor._ready.wait()
                if supervisor.failure is None:
                    with supervisor._body:
                        yield supervisor
            except BaseException as caught:  # kept while the tree stops, raised again below
                error = caught
            leave()
            with trio.CancelScope(
                shield=True
            ):  # to leave the nursery empty, so that it raises nothing itself
                await supervisor.wait_stopped()
                await watched.wait()
    if supervisor.failure is not None:
        if error is not None and not isinstance(error, trio.Cancelled):
            supervisor.failure.add_note(f"Meanwhile the body of {supervisor.name!r} raised {describe(error)}")
        raise supervisor.failure
    if error is not None:
        raise error


@dataclass(frozen=True)
class SupervisorChild:
    """What `ChildSpec.supervisor` runs."""

    name: str
    children: tuple[ChildSpec, ...]
    flags: Flags

    async def __call__(self, *, task_status: trio.TaskStatus[Supervisor]) -> None:
        """Be a nested supervisor until cancelled, stopped, or failed; stopping by itself is a normal end."""
        async with _opened(Supervisor(self.name, self.children, self.flags), math.inf, None) as supervisor:
            task_status.started(supervisor)
            await supervisor.wait_stopped()
