"""What a program sees of a supervisor, and how to open one."""

from __future__ import annotations

import contextvars
import math
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import trio

from ullm.supervision.actor import current_lifetime
from ullm.supervision.children import describe
from ullm.supervision.control import Control
from ullm.supervision.policy import AutoShutdown, Strategy
from ullm.supervision.shutdown import ChildReport
from ullm.supervision.spec import ChildCounts, ChildInfo, ChildSpec, ChildStatus, Flags, Kind


class Supervisor:
    """A running supervisor; `open_supervisor` makes one.

    Reading (`which_children`, `count_children`, `get_childspec`) answers at once, also while a child is
    being started. Changes are made one after another by the control task; cancelling the caller of one
    takes it back if it is not done yet.
    """

    def __init__(self, control: Control) -> None:
        self._control = control

    def __repr__(self) -> str:
        state = "stopped" if self._control.finished.is_set() else "stopping" if self.stopping else "running"
        return f"<Supervisor {self.name!r} {state}, {len(self._control.children)} children>"

    @property
    def name(self) -> str:
        """As in logs and error messages."""
        return self._control.name

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for, or a failure has begun one."""
        return self._control.stopping

    @property
    def auto_stopped(self) -> bool:
        """Whether it stopped because its significant children had ended."""
        return self._control.auto_stopped

    @property
    def failure(self) -> BaseException | None:
        """Why it gave up; None if it did not."""
        return self._control.failure

    @property
    def reports(self) -> tuple[ChildReport, ...]:
        """How the children were stopped, in the order in which they were; empty until then."""
        return self._control.reports

    # --- reading -------------------------------------------------------------------------------

    def which_children(self) -> tuple[ChildInfo, ...]:
        """The children in order of start, those of nested supervisors within them."""
        return tuple(child.info() for child in self._control.children.values())

    def count_children(self) -> ChildCounts:
        """How many there are, restarting ones included."""
        children = self._control.children.values()
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
        return self._control.find(child_id).spec

    # --- changing ------------------------------------------------------------------------------

    async def start_child(self, spec: ChildSpec) -> ChildInfo:
        """Add a child and start it; returns when it is ready.

        Under the dynamic strategy the returned ``child_id`` is the given one with a number.

        Raises:
            StartFailed: it failed; the specification is not kept.
            ChildConflict: there is a child of this id.
            ActorLost: the supervisor is stopping.
        """
        self._control.check(spec)
        return await self._control.call(partial(self._control.add, spec))

    async def terminate_child(self, child_id: str) -> ChildReport | None:
        """Stop a child, also one that is being started or waits to be restarted; None if it did not run.

        Its specification is kept for `restart_child`, unless it is temporary or dynamic.

        Raises:
            ChildNotFound: there is no such child.
            ActorLost: the supervisor is stopping.
        """
        child = self._control.find(child_id)
        if child.status is ChildStatus.STARTING and child.incarnation is not None:
            child.incarnation.scope.cancel()  # a start that hangs must not keep the control task
        return await self._control.call(partial(self._control.remove, child))

    async def restart_child(self, child_id: str) -> ChildInfo:
        """Start a child again that was terminated or has ended.

        Raises:
            StartFailed: it failed; it stays stopped.
            ChildNotFound: there is no such child.
            ChildConflict: it runs, or is being restarted.
            ActorLost: the supervisor is stopping.
        """
        return await self._control.call(partial(self._control.start_stopped, child_id))

    async def delete_child(self, child_id: str) -> None:
        """Forget a child that does not run.

        Raises:
            ChildNotFound: there is no such child.
            ChildConflict: it runs, or is being restarted.
            ActorLost: the supervisor is stopping.
        """
        await self._control.call(partial(self._control.delete_stopped, child_id))

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
        self._control.request_stop(deadline)

    def kill(self) -> None:
        """Stop with force: no budget for anyone, kill hooks at once."""
        self.request_stop(-math.inf)

    async def wait_stopped(self) -> None:
        """Wait until the supervisor and its children have stopped, for whatever reason."""
        await self._control.finished.wait()


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
    on_opened: Callable[[Supervisor], None] | None = None,
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
        on_opened: called before the first child is started, for those who want to look on.

    Raises:
        StartFailed: a child did not become ready; those before it were stopped.
        RestartLimitReached: children failed too often.
        ConfigError: values that make no sense.
    """
    flags = Flags(strategy, intensity, period, auto_shutdown, restart_delay, on_abandoned)
    control = Control(name, tuple(children), flags)
    if on_opened is not None:
        on_opened(Supervisor(control))
    async with _opened(control, shutdown_timeout, on_cancelled) as supervisor:
        yield supervisor


@asynccontextmanager
async def _opened(
    control: Control, shutdown_timeout: float, on_cancelled: Callable[[Supervisor], None] | None
) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(control)
    watched = trio.Event()
    error: BaseException | None = None

    def leave() -> None:
        control.request_stop(trio.current_time() + shutdown_timeout)

    async def watch() -> None:
        try:
            await control.finished.wait()
        except trio.Cancelled:  # ends this task, which is all that cancelling it is about
            if not control.stopping:
                on_cancelled(supervisor) if on_cancelled is not None else leave()
        watched.set()

    lifetime = current_lifetime()
    with lifetime.followed_by(control.terminator.expedite) if lifetime is not None else nullcontext():
        async with trio.open_nursery() as guard:
            guard.start_soon(watch)
            trio.lowlevel.spawn_system_task(
                control.host, name=f"supervisor {control.name}", context=contextvars.copy_context()
            )
            try:
                await control.ready.wait()
                if control.failure is None:
                    with control.body:
                        yield supervisor
            except BaseException as caught:  # kept while the tree stops, raised again below
                error = caught
            leave()
            with trio.CancelScope(
                shield=True
            ):  # to leave the nursery empty, so that it raises nothing itself
                await control.finished.wait()
                await watched.wait()
    if control.failure is not None:
        if error is not None and not isinstance(error, trio.Cancelled):
            control.failure.add_note(f"Meanwhile the body of {control.name!r} raised {describe(error)}")
        raise control.failure
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
        async with _opened(Control(self.name, self.children, self.flags), math.inf, None) as supervisor:
            task_status.started(supervisor)
            await supervisor.wait_stopped()
