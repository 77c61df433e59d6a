"""A supervisor's control task: one state machine that handles one event after another.

Events are the end of a child, the next attempt to start one that failed, and calls from other tasks.
Children live in a system task's nursery, so that cancelling the scope around the supervisor does not
reach them directly: it asks for the same orderly stop as everything else. It also means that a child
which ignores cancellation can be left behind and reported, where a nursery would wait for it forever.
Longer than 300 lines, because these rules are better read in one place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

import trio

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
from ullm.supervision.spec import ChildInfo, ChildSpec, ChildStatus, Flags
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


class Control:
    """The state and the rules of one supervisor; `Supervisor` is what others see of it."""

    def __init__(self, name: str, children: Sequence[ChildSpec], flags: Flags) -> None:
        self.name = name
        self.flags = flags
        self.children: dict[str, Child] = {}
        self.failure: BaseException | None = None
        self.reports: tuple[ChildReport, ...] = ()
        self.stopping = False
        self.auto_stopped = False
        self.terminator = Terminator(name, flags.on_abandoned)
        self.body = trio.CancelScope()
        """Around the body of open_supervisor; cancelled when the supervisor ends by itself."""
        self.ready = trio.Event()
        """All initial children have started, or one of them failed."""
        self.finished = trio.Event()
        self._initial = children
        self._window = RestartWindow(flags.intensity, flags.period)
        self._send, self._events = trio.open_memory_channel[Incarnation | _Retry | _Call[Any]](math.inf)
        self._calls: set[_Call[Any]] = set()
        self._work = trio.CancelScope()
        self._nursery: trio.Nursery
        self._serial = 0
        self._check_initial()

    async def host(self) -> None:
        """A system task; it must not raise, and stays as long as abandoned children do."""
        async with trio.open_nursery() as self._nursery:
            await self._run()
            self._nursery.cancel_scope.cancel()

    async def _run(self) -> None:
        try:
            with self._work:
                await self._start_initial()
                self.ready.set()
                async for event in self._events:
                    await self._handle(event)
        except BaseException as error:  # raised again by open_supervisor, when the tree is down
            self._fail(error)
        self.request_stop()
        self.reports = await self._stop_all()
        self.finished.set()
        self.ready.set()

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.body.cancel()
        if not isinstance(error, StartFailed):  # whoever starts it hears of that one, once
            log.warning("supervisor gave up", supervisor=self.name, cause=describe(error))

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

    def request_stop(self, deadline: float = math.inf) -> None:
        """What `stop` does, without waiting for it."""
        self.terminator.expedite(deadline)
        if self.stopping:
            return
        self.stopping = True
        self._work.cancel()
        for call in self._calls:
            call.fail(ActorLost(f"supervisor {self.name!r} is stopping"))

    # --- starting ------------------------------------------------------------------------------

    def check(self, spec: ChildSpec) -> None:
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
            self.check(spec)

    async def _start_initial(self) -> None:
        for spec in self._initial:
            await self.add(spec)

    async def add(self, spec: ChildSpec) -> ChildInfo:
        child = Child(self._with_unique_id(spec))
        self.children[child.spec.child_id] = child
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
        if spec.child_id in self.children:
            raise ChildConflict(self.name, spec.child_id, self.children[spec.child_id].status)
        return spec

    async def _start(self, child: Child) -> None:
        """Start it and wait until it is ready, declines, or fails.

        Raises:
            StartFailed: it failed; the child is left stopped.
        """
        await trio.lowlevel.checkpoint_if_cancelled()  # a stop may have come while siblings were ended
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
        child = self.children.get(incarnation.spec.child_id)
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
            self.body.cancel()
            self.request_stop()

    def _significant_active(self) -> bool:
        return any(
            child.spec.significant and child.status is not ChildStatus.STOPPED
            for child in self.children.values()
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
        ids = affected(self.flags.strategy, self.children, child.spec.child_id)
        return [self.children[child_id] for child_id in ids]

    async def _stop_affected(self, child: Child) -> None:
        """Stop the others in reverse order; temporary ones are not going to be started again."""
        for each in reversed(self._affected(child)):
            if each is child:
                continue
            await trio.lowlevel.checkpoint_if_cancelled()
            await self._terminate([each])
            if each.temporary:
                self._forget(each)

    # --- changes -------------------------------------------------------------------------------

    def find(self, child_id: str) -> Child:
        try:
            return self.children[child_id]
        except KeyError:
            raise ChildNotFound(self.name, child_id) from None

    def _find_stopped(self, child_id: str) -> Child:
        child = self.find(child_id)
        if child.status is not ChildStatus.STOPPED:
            raise ChildConflict(self.name, child_id, child.status)
        return child

    async def remove(self, child: Child) -> ChildReport | None:
        reports = await self._terminate([child])
        self._forget_if_gone_for_good(child)
        return reports[0] if reports else None

    async def start_stopped(self, child_id: str) -> ChildInfo:
        child = self._find_stopped(child_id)
        try:
            await self._start(child)
        except trio.Cancelled:
            if not self.stopping:
                await self._terminate([child])
            raise
        return child.info()

    async def delete_stopped(self, child_id: str) -> None:
        self._forget(self._find_stopped(child_id))

    def _forget_if_gone_for_good(self, child: Child) -> None:
        if child.temporary or self.flags.strategy is Strategy.DYNAMIC:
            self._forget(child)

    def _forget(self, child: Child) -> None:
        self.children.pop(child.spec.child_id, None)

    # --- ending children -----------------------------------------------------------------------

    async def _terminate(
        self, children: Sequence[Child], later: float = 0.0, unlimited: int = 0
    ) -> list[ChildReport]:
        """End those of ``children`` that run, all at once, and report on them."""
        running = [child.incarnation for child in children if child.incarnation is not None]
        reports = await self.terminator.stop(running, later, unlimited)
        for child in children:
            child.stopped()
        return reports

    async def _stop_all(self) -> tuple[ChildReport, ...]:
        """End all children in reverse order; what is left at the deadline, all at once."""
        left = [child for child in self.children.values() if child.incarnation is not None]
        later = sum(child.spec.shutdown for child in left if math.isfinite(child.spec.shutdown))
        unlimited = sum(math.isinf(child.spec.shutdown) for child in left)
        earlier = self.terminator.abandoned()
        reports: list[ChildReport] = []
        while (
            left
            and self.flags.strategy is not Strategy.DYNAMIC
            and trio.current_time() < self.terminator.deadline
        ):
            child = left.pop()
            if math.isinf(child.spec.shutdown):
                unlimited -= 1
            else:
                later -= child.spec.shutdown
            reports += await self._terminate([child], later, unlimited)
        reports += await self._terminate(left[::-1])
        return (*reports, *earlier)
