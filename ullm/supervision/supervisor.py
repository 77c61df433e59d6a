"""The public side of a supervisor, and how to open one."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from ullm.supervision.actor import current_lifetime
from ullm.supervision.control import Control
from ullm.supervision.errors import ChildConflict, NoState, describe
from ullm.supervision.names import context_with
from ullm.supervision.policy import AutoShutdown, Restart, Strategy
from ullm.supervision.shutdown import INFINITY, ChildReport
from ullm.supervision.spec import ChildCounts, ChildEnd, ChildInfo, ChildSpec, ChildStatus, Flags, Hook, Kind
from ullm.supervision.starts import Change, Start


class Supervisor:
    """A running supervisor, as `open_supervisor` yields it.

    Reading (`which_children`, `count_children`, `get_childspec`) answers at once, also while a child is
    being started. Changes are made by the control task, which no start keeps waiting: the initial children
    start one after another; after them children start, fail, are restarted, ended and forgotten side by side.
    Cancelling the caller of a change takes it back if it is not done yet. The methods have the names of those
    of OTP's supervisor.
    """

    def __init__(self, control: Control) -> None:
        self._control = control

    def __repr__(self) -> str:
        state = "stopped" if self._control.finished.is_set() else "stopping" if self.stopping else "running"
        return f"<Supervisor {self.name!r} {state}, {len(self._control.roster)} children>"

    @property
    def name(self) -> str:
        """The name in logs and error messages."""
        return self._control.name

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for, or a failure has begun one."""
        return self._control.stopping

    @property
    def auto_stopped(self) -> bool:
        """Whether it stopped because significant children had ended."""
        return self._control.auto_stopped

    @property
    def failure(self) -> BaseException | None:
        """The exception that made it give up; None if it did not."""
        return self._control.failure

    @property
    def reports(self) -> tuple[ChildReport, ...]:
        """A report of each child, in the order in which they were stopped; empty until then."""
        return self._control.reports

    # --- reading -------------------------------------------------------------------------------

    def which_children(self) -> tuple[ChildInfo, ...]:
        """Return the children in order of start, those of nested supervisors within them."""
        return tuple(child.info() for child in self._control.roster)

    def count_children(self) -> ChildCounts:
        """Return the number of children, those included that wait to be restarted."""
        children = tuple(self._control.roster)
        supervisors = sum(child.spec.kind is Kind.SUPERVISOR for child in children)
        return ChildCounts(
            specs=len(children),
            active=sum(child.incarnation is not None for child in children),
            restarting=sum(child.status is ChildStatus.RESTARTING for child in children),
            supervisors=supervisors,
            workers=len(children) - supervisors,
        )

    def get_childspec(self, child_id: str) -> ChildSpec:
        """Return the specification of a child.

        Raises:
            ChildNotFound: there is no such child.
        """
        return self._control.roster.find(child_id).spec

    def get_state(self, child_id: str) -> Any:
        """Return the state that a running child has published with `publish_state`, as it is now.

        Raises:
            ChildNotFound: there is no such child.
            NoState: it does not run, or has published none.
        """
        incarnation = self._control.roster.find(child_id).incarnation
        if incarnation is None or incarnation.lifetime.state is None:
            raise NoState(child_id)
        return incarnation.lifetime.state()

    def whereis(self, name: str) -> Any:
        """Return what the child of this name, anywhere in the tree, passed to ``task_status.started``.

        Raises:
            NameNotFound: no child of this name is up.
        """
        return self._control.names.find(name)

    async def monitor(self, child_id: str) -> ChildEnd:
        """Wait for the end of a child as it runs now, and return how it ended; a restart comes after it.

        An abandoned child ends when its task does, which may be never.

        Raises:
            ChildNotFound: there is no such child.
            ChildConflict: it does not run.
        """
        child = self._control.roster.find(child_id)
        incarnation = child.incarnation
        if incarnation is None:
            raise ChildConflict(self.name, child_id, child.status)
        await incarnation.done.wait()
        return incarnation.end()

    # --- changing ------------------------------------------------------------------------------

    async def start_child(self, spec: ChildSpec) -> ChildInfo:
        """Add a child, start it, and wait until it is ready.

        Under the dynamic strategy the returned ``child_id`` is the given one with a number.

        Raises:
            InvalidSpec: the specification does not fit the supervisor's options.
            StartFailed: it failed; the specification is not kept.
            StartDeadlock: the caller is a child for which this supervisor waits before it starts others.
            ChildConflict: there is a child of this id.
            TooManyChildren: there are as many as ``max_children`` allows.
            ActorLost: the supervisor is stopping.
        """
        self._control.roster.check(spec)
        self._control.check_start()
        info: ChildInfo = await self._control.call(Start(partial(self._control.roster.add, spec)))
        return info

    async def terminate_child(self, child_id: str) -> ChildReport | None:
        """Stop a child, also one that is being started or waits to be restarted.

        Its specification is kept for `restart_child`, unless it is temporary or dynamic.

        Returns:
            The report of its stop; None if it did not run.

        Raises:
            ChildNotFound: there is no such child.
            ActorLost: the supervisor is stopping.
        """
        child = self._control.roster.find(child_id)
        report: ChildReport | None = await self._control.call(Change(partial(self._control.remove, child)))
        return report

    async def restart_child(self, child_id: str) -> ChildInfo:
        """Start a child again that was terminated or has ended.

        Raises:
            StartFailed: it failed; it stays stopped.
            StartDeadlock: the caller is a child for which this supervisor waits before it starts others.
            ChildNotFound: there is no such child.
            ChildConflict: it runs, or is being restarted.
            ActorLost: the supervisor is stopping.
        """
        self._control.check_start()
        take = partial(self._control.roster.find_stopped, child_id)
        info: ChildInfo = await self._control.call(Start(take, kept=True))
        return info

    async def delete_child(self, child_id: str) -> None:
        """Forget a child that does not run.

        Raises:
            ChildNotFound: there is no such child.
            ChildConflict: it runs, or is being restarted.
            ActorLost: the supervisor is stopping.
        """
        await self._control.call(Change(partial(self._control.delete_stopped, child_id)))

    # --- stopping ------------------------------------------------------------------------------

    async def stop(self, deadline: float = math.inf) -> tuple[ChildReport, ...]:
        """Stop all children in reverse order of start, then the supervisor; return the children's reports.

        Args:
            deadline: absolute, in trio's time. Each child has its own budget within it. A further call
                with an earlier deadline tightens it.
        """
        self.request_stop(deadline)
        await self.wait_stopped()
        return self.reports

    def request_stop(self, deadline: float = math.inf) -> None:
        """Begin to stop, as `stop` does, and return at once."""
        self._control.request_stop(deadline)

    def kill(self) -> None:
        """Stop by force: no budgets, and kill hooks at once."""
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
    on_failure: Hook | None = None,
    on_restart: Hook | None = None,
    on_give_up: Hook | None = None,
    max_children: float = INFINITY,
    shutdown_timeout: float = math.inf,
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
        on_failure: called with a child's id and its exception when it has failed, before it is restarted.
        on_restart: called with a child's id and the exception, its own or a sibling's, for which it was
            started again, when it is up.
        on_give_up: called with the id of the child that failed last and the `RestartLimitReached`, before
            the children are stopped.
        max_children: how many children are kept at most, running or not.
        shutdown_timeout: seconds for the whole stop when the body is left or cancelled, counted from
            then; within a supervised child, its own stop deadline holds as well.
        on_opened: called before the first child is started, so that the start can be watched.

    Raises:
        StartFailed: a child did not become ready; those before it were stopped.
        RestartLimitReached: children failed too often.
        InvalidSpec: an option or a specification makes no sense.
    """
    hooks = (on_abandoned, on_failure, on_restart, on_give_up)
    flags = Flags(strategy, intensity, period, auto_shutdown, restart_delay, *hooks, max_children)
    control = Control(name, tuple(children), flags)
    if on_opened is not None:
        on_opened(Supervisor(control))
    async with opened(control, shutdown_timeout) as supervisor:
        yield supervisor


@asynccontextmanager
async def opened(control: Control, shutdown_timeout: float) -> AsyncIterator[Supervisor]:
    """Do what `open_supervisor` does, with a control that is not running yet."""
    supervisor = Supervisor(control)
    watched = trio.Event()
    error: BaseException | None = None

    def leave() -> None:
        control.request_stop(trio.current_time() + shutdown_timeout)

    async def watch() -> None:
        try:
            await control.finished.wait()
        except trio.Cancelled:  # not raised again: this task ends here, which is all that is asked of it
            if not control.stopping:
                leave()
        watched.set()

    lifetime = current_lifetime()
    with lifetime.followed_by(control.terminator.expedite) if lifetime is not None else nullcontext():
        async with trio.open_nursery() as guard:
            guard.start_soon(watch)
            trio.lowlevel.spawn_system_task(
                control.host, name=f"supervisor {control.name}", context=context_with(control.names)
            )
            try:
                await control.ready.wait()
                if control.failure is None:
                    with control.body:
                        yield supervisor
            except BaseException as caught:  # kept while the tree stops, raised again below
                error = caught
            leave()
            with trio.CancelScope(shield=True):  # leaves the nursery empty, so that it raises nothing itself
                await control.finished.wait()
                await watched.wait()
    if control.failure is not None:
        if error is not None and not isinstance(error, trio.Cancelled):
            control.failure.add_note(f"Meanwhile the body of {control.name!r} raised {describe(error)}")
        raise control.failure
    if error is not None:
        raise error


def supervisor_child(
    child_id: str,
    children: Sequence[ChildSpec] = (),
    *,
    strategy: Strategy = Strategy.ONE_FOR_ONE,
    intensity: float = 1,
    period: float = 5.0,
    auto_shutdown: AutoShutdown = AutoShutdown.NEVER,
    restart_delay: Callable[[int], float] | None = None,
    on_abandoned: Callable[[ChildReport], None] | None = None,
    on_failure: Hook | None = None,
    on_restart: Hook | None = None,
    on_give_up: Hook | None = None,
    max_children: float = INFINITY,
    restart: Restart = Restart.PERMANENT,
    shutdown: float = INFINITY,
    significant: bool = False,
    start_timeout: float = INFINITY,
    name: str | None = None,
) -> ChildSpec:
    """Return the specification of a child that is itself a supervisor.

    The options up to ``max_children`` are those of `open_supervisor`, the others those of `ChildSpec`.

    Raises:
        InvalidSpec: a value makes no sense.
    """
    hooks = (on_abandoned, on_failure, on_restart, on_give_up)
    flags = Flags(strategy, intensity, period, auto_shutdown, restart_delay, *hooks, max_children)
    run = NestedSupervisor(child_id, tuple(children), flags)
    return ChildSpec(
        child_id, run, restart, shutdown, None, significant, Kind.SUPERVISOR, start_timeout, name
    )


@dataclass(frozen=True)
class NestedSupervisor:
    """The async function that a child made by `supervisor_child` runs."""

    name: str
    children: tuple[ChildSpec, ...]
    flags: Flags

    async def __call__(self, *, task_status: trio.TaskStatus[Supervisor]) -> None:
        """Supervise until cancelled, stopped, or failed; stopping by itself is a normal end."""
        async with opened(Control(self.name, self.children, self.flags), math.inf) as supervisor:
            task_status.started(supervisor)
            await supervisor.wait_stopped()
