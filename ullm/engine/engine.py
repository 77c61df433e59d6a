"""The engine: one supervision tree, from the moment it is opened until all of it is gone.

    async with open_engine(EngineConfig(model="…")) as engine:
        async with engine.generate("Hello", SamplingParams(max_tokens=20)) as generation:
            async for output in generation:
                print(output.text)

Leaving the block, cancelling the scope around it, and `Engine.request_shutdown` all start the same
orderly stop: admitted requests run on until the deadline less what the teardown needs, then end with
``finish_reason="abort"``, then the tree is stopped in the reverse order of its start.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import trio

from ullm.actors.router import Router
from ullm.actors.standby_pool import StandbyPool
from ullm.actors.tokenizer import Tokenizer
from ullm.actors.transports import OpenTransport, open_transport
from ullm.actors.transports.faulty import faulty
from ullm.config import EngineConfig, SleepMode
from ullm.engine.fleet import Fleet
from ullm.engine.generation import Generation, Readers
from ullm.engine.lifecycle import AWAKE, Lifecycle
from ullm.engine.status import EngineStatistics, Health, ReloadReport, SleepHealth
from ullm.engine.stop import Stop
from ullm.errors import (
    ActorLost,
    EngineBusy,
    EngineDead,
    EngineDraining,
    EngineNotReady,
    EngineSleeping,
    ReloadFailed,
    StartCancelled,
    first_cause,
)
from ullm.faults import FaultInjector
from ullm.hub import LocalModel, resolve
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.protocol.messages import ModelInfo
from ullm.sampling import SamplingParams
from ullm.supervision import (
    ChildInfo,
    ChildReport,
    ChildSpec,
    EngineState,
    ShutdownReport,
    StateCell,
    Supervisor,
    open_supervisor,
)

log = get_logger("ullm.engine")

_NOT_READY = {
    "restarting": "no replica is up",
    "sleeping": "asleep, and started with --no-wake-on-request",
}


class Engine:
    """See the module; made by `open_engine`.

    Args:
        first_children: children that start before all others and stop after them, such as the HTTP
            server, which so can answer probes from the first moment to the last.
        transport: how to start workers, instead of ``config.transport``.
        find_model: what stands in for `find_local_model`; called in a thread.

    Attributes:
        faults: where faults are armed and counted; see docs/fault-injection.md.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        first_children: Sequence[ChildSpec] = (),
        transport: OpenTransport | None = None,
        find_model: Callable[[EngineConfig], LocalModel] | None = None,
    ) -> None:
        self.config = config
        self.model_name = config.model_name
        self.info: ModelInfo | None = None
        self.tokenizer: Tokenizer | None = None
        self.report: ShutdownReport | None = None
        self._first_children = list(first_children)
        self._find_model = find_model or find_local_model
        self._state = StateCell()
        self.faults = FaultInjector.from_text(
            config.faults, transport=config.worker_transport if transport is None else ""
        )
        self._router = Router(config, self.faults)
        standby = None
        if transport is None:
            transport = open_transport(config.worker_transport)
            standby = StandbyPool(transport) if config.worker_transport == "process" else None
        transport = faulty(standby.open if standby is not None else transport, self.faults)
        self._fleet = Fleet(config, self._router, transport, self._give_up, self.faults, standby)
        self._lifecycle = Lifecycle(
            config,
            self._router,
            self._fleet,
            self._find_model,
            self._take_model,
            self._give_up,
            self.faults,
        )
        self._root: Supervisor | None = None
        self._readers = Readers()
        self._stop = Stop(config, self._state, self._router, self._readers, self._lifecycle)
        self._child_reports: Sequence[ChildReport] = ()
        self._stopped = trio.Event()
        self._started = False
        self._starting = trio.CancelScope()
        self._failure: str | None = None

    # --- requests --------------------------------------------------------------------------------------

    def check_admission(self) -> None:
        """Raise the reason why a request would not be taken now; return if it would be.

        Raises:
            EngineDead, EngineNotReady, EngineDraining, QueueFull
        """
        state = self.state
        if self._failure is not None:
            raise EngineDead(f"the engine has failed: {self._failure}")
        if state is EngineState.STARTING:
            raise EngineNotReady(state.value)
        if state is not EngineState.RUNNING:
            raise EngineDraining(state.value)
        if not self._lifecycle.health().registered:
            raise EngineSleeping
        self._router.check_room()

    def generate(
        self, prompt: Sequence[int] | str, params: SamplingParams, *, request_id: str | None = None
    ) -> Generation:
        """A request, to be entered with ``async with`` and then iterated; see `Generation`.

        Raises:
            EngineDead, EngineNotReady, EngineDraining, QueueFull
        """
        self.check_admission()
        assert self.tokenizer is not None, "a running engine has a tokenizer"
        assert self.info is not None, "a running engine has a model"
        name = request_id or f"req-{uuid.uuid4().hex}"
        return Generation(self._router, self._readers, self.tokenizer, self.info, prompt, params, name)

    def abort(self, request_id: str) -> bool:
        """End a request with what it has; False if there is none of that name."""
        found = self._router.find(request_id)
        for seq_id in found:
            self._router.finish(seq_id, "abort")
        return bool(found)

    # --- what is inside ----------------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life; only goes forward."""
        return self._state.value

    def health(self) -> Health:
        """What the probes answer."""
        sleep, running = self._lifecycle.health(), self.state is EngineState.RUNNING
        up = bool(self._router.replicas_up)
        state = self.state.value
        if running:
            state = "sleeping" if sleep.state != AWAKE else "running" if up else "restarting"
        ready = running and sleep.registered and (up or sleep.state != AWAKE)
        starting = self.state is EngineState.STARTING
        return Health(
            state=state,
            live=self._failure is None,
            ready=ready,
            detail="" if ready else self._failure or _NOT_READY.get(state, state),
            replicas=self._fleet.health(starting=starting, sleep=sleep.state),
            sleep=sleep,
        )

    def statistics(self) -> EngineStatistics:
        """What is inside, as a frozen value."""
        router = self._router.statistics()
        lifecycle = self._lifecycle
        inside = [found for r in self._fleet.replicas if (found := r.scheduler.statistics()) is not None]
        running = sum(s.running for s in inside)
        spares = self._fleet.spares()
        return EngineStatistics(
            running=running,
            waiting=max(0, router.live - running),
            kv_blocks_used=sum(s.blocks_used for s in inside),
            kv_blocks_total=sum(s.blocks_total for s in inside),
            prefix_cache_hit_tokens=sum(s.prefix_hits for s in inside),
            prefix_cache_query_tokens=sum(s.prefix_queries for s in inside),
            prompt_tokens_total=router.prompt_tokens,
            generation_tokens_total=router.generated_tokens,
            preemptions_total=sum(s.preemptions for s in inside),
            requests_total=router.finished,
            worker_restarts_total=self._fleet.restarts,
            requests_resumed_total=router.resumed,
            tokens_resubmitted_total=router.resumed_tokens,
            sleeps_total=dict(lifecycle.sleeps),
            wakes_total=lifecycle.wakes,
            last_sleep_seconds=lifecycle.sleep_seconds,
            last_wake_seconds=lifecycle.wake_seconds,
            bytes_given_back=lifecycle.given_back,
            reloads_total=dict(lifecycle.reloads),
            admitted_tokens=router.admitted_tokens,
            draft_tokens_total=sum(s.draft_tokens for s in inside),
            steps_total=sum(s.steps for s in inside),
            accepted_tokens_total=sum(s.accepted_tokens for s in inside),
            standby_prepared=spares.prepared,
            standby_preparing=spares.preparing,
            standby_taken_total=spares.taken_total,
            standby_lost_total=spares.lost_total,
        )

    def children(self) -> tuple[ChildInfo, ...]:
        """The supervision tree as it is now; empty before it is started."""
        return self._root.which_children() if self._root is not None else ()

    # --- sleeping and reloading ----------------------------------------------------------------------------

    async def sleep(self, level: int | None = None, mode: SleepMode = "wait") -> SleepHealth:
        """Give memory back until `wake`, or until a request comes; see `ullm.config.SleepConfig`.

        Does nothing if the engine sleeps as deep already; a deeper level may follow.

        Args:
            level: 0 pauses; 1 moves weights to host memory and drops the KV cache; 2 drops weights too;
                3 ends the worker processes. Default: the configuration's.
            mode: requests in flight are waited for, aborted, or kept for the time after.

        Raises:
            InvalidParameter: no such level or mode.
            EngineNotReady, EngineDraining, EngineDead: it does not run.
            EngineBusy: a wake or a stop overtook it.
        """
        return await self._change(
            self._lifecycle.sleep, self.config.sleep_level if level is None else level, mode
        )

    async def wake(self) -> SleepHealth:
        """Be awake; returns when requests run again.

        Raises:
            EngineNotReady, EngineDraining, EngineDead: it does not run.
            EngineBusy: a stop overtook it.
        """
        return await self._change(self._lifecycle.wake)

    async def reload(self, model: str | None = None, revision: str | None = None) -> ReloadReport:
        """Load the model again in new workers, which take over while requests go on; none of them fails.

        Args:
            model: another place of the weights; they must have the same tokenizer.
            revision: another revision of a hub model.

        Raises:
            ReloadFailed: the new workers did not come up; the old ones serve on.
            EngineNotReady, EngineDraining, EngineDead: it does not run.
            EngineBusy: a stop overtook it.
        """
        self._check_running()
        with self._overtaken_by_stop():
            return await self._lifecycle.reload(model, revision)

    def request_reload(self) -> None:
        """Begin a reload, if the engine runs; returns at once, and the log says how it goes."""
        if self.state is EngineState.RUNNING:
            self._lifecycle.request_reload()

    async def _change(self, change: Callable[..., Awaitable[None]], *arguments: Any) -> SleepHealth:
        self._check_running()
        with self._overtaken_by_stop():
            await change(*arguments)
        return self._lifecycle.health()

    def _check_running(self) -> None:
        if self._failure is not None:
            raise EngineDead(f"the engine has failed: {self._failure}")
        if self.state is EngineState.STARTING:
            raise EngineNotReady(self.state.value)
        if self.state is not EngineState.RUNNING:
            raise EngineDraining(self.state.value)

    @contextmanager
    def _overtaken_by_stop(self) -> Iterator[None]:
        """The stop of the engine, or a failure of its own, ends the actor that was asked."""
        try:
            yield
        except (ActorLost, ReloadFailed) as error:
            if self.state is EngineState.RUNNING:
                failed = isinstance(error, ReloadFailed)
                raise error if failed else EngineNotReady("restarting a part of itself") from error
            raise EngineBusy(f"the engine is {self.state.value}; it was overtaken") from error

    # --- stopping ------------------------------------------------------------------------------------------

    def request_shutdown(self, timeout: float | None = None, *, by: str = "shutdown()") -> None:
        """Begin the orderly stop; returns at once. Later calls can only make it sooner.

        Args:
            timeout: seconds from now until all is gone; default: the configuration's.
            by: who asked, for the report.
        """
        self._stop.request(timeout, by)
        if self.state is EngineState.STARTING:
            self._starting.cancel()

    def expedite(self) -> None:
        """Skip the rest of the drain: end all requests now, and stop in order."""
        self.request_shutdown(0.0)
        self._stop.skip_drain()

    def kill(self, signal_number: int) -> None:
        """Kill the workers; what stops in order after that stops at once."""
        self._stop.forced_by = signal_number
        self.expedite()
        self._fleet.kill()

    async def shutdown(self, timeout: float | None = None) -> ShutdownReport:  # noqa: ASYNC109  # a promise, not a scope
        """Stop in order, and say how it went."""
        self.request_shutdown(timeout)
        return await self.wait_stopped()

    async def wait_stopped(self) -> ShutdownReport:
        """Wait for the end, whoever asks for it."""
        await self._stopped.wait()
        assert self.report is not None, "the report is written before the end is announced"
        return self.report

    # --- the tree ------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Start the tree, be ready when it is, and supervise it until it has stopped.

        Raises:
            UllmError: it could not start; the first cause, not what wraps it.
            EngineDead: it failed beyond its restart limits, and has been stopped in order.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._notice_cancellation)
            try:
                with trio.CancelScope(shield=True):
                    await self._run_tree(task_status)
            finally:
                self._stopped.set()
                nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise EngineDead(f"the engine has failed: {self._failure}")
        if not self._started:
            raise StartCancelled

    async def _notice_cancellation(self) -> None:
        """The scope around the engine may be cancelled at any time; the tree itself is shielded."""
        try:
            await trio.sleep_forever()
        finally:
            self.request_shutdown(by="cancelled")

    async def _run_tree(self, task_status: trio.TaskStatus[None]) -> None:
        try:
            with self._starting:
                async with open_supervisor(
                    "engine",
                    self._first_children,
                    intensity=self.config.max_restarts,
                    period=self.config.restart_period,
                    on_opened=self._take_root,
                ) as root:
                    await self._prepare()
                    self._fleet.supervised_by(root)
                    for child in self._children():
                        await root.start_child(child)
                    self._take_info()
                    await self._fleet.wait_up()
                    with self._telling_readers(root):
                        self._state.advance(EngineState.RUNNING)
                        self._started = True
                        log.info("engine running", model=self.model_name)
                        task_status.started()
                        await self._stop.requested.wait()
                        self.report, self._child_reports = await self._stop.run(root)
        except BaseException as error:
            cause = first_cause(error)
            if not isinstance(cause, Exception):
                raise
            if self.state is EngineState.STARTING:
                raise cause from error
            self._fail(cause)
        finally:
            self._finish()

    @contextmanager
    def _telling_readers(self, root: Supervisor) -> Iterator[None]:
        """If the root gives up, readers hear of it at once, while those who write to clients still run."""
        try:
            yield
        except trio.Cancelled:
            if root.failure is not None:
                self._fail(first_cause(root.failure))
            raise

    def _take_root(self, root: Supervisor) -> None:
        """The tree can be looked at while it starts."""
        self._root = root

    def _take_info(self) -> None:
        info = self._fleet.replicas[0].group.info
        assert info is not None, "a group that has started knows its model"
        assert self.tokenizer is not None, "the tokenizer is started before the replicas"
        self.info = info
        self.tokenizer.max_tokens = info.context_len

    async def _prepare(self) -> None:
        """Find the model's files, which the other children need; a download may take minutes."""
        self._lifecycle.local = await trio.to_thread.run_sync(self._find_model, self.config)
        self.tokenizer = Tokenizer(self._lifecycle.local, self.faults)

    def _children(self) -> list[ChildSpec]:
        """Those that start after the first ones."""
        assert self.tokenizer is not None, "the model is resolved before the tree is started"
        assert self._lifecycle.local is not None, "the model is resolved before the tree is started"
        return [
            ChildSpec("tokenizer", self.tokenizer.run, shutdown=stop_budget.TOKENIZER),
            *self._fleet.specs(str(self._lifecycle.local.path)),
            ChildSpec("router", self._router.run, shutdown=stop_budget.ROUTER),
            ChildSpec("lifecycle", self._lifecycle.run, shutdown=stop_budget.LIFECYCLE),
        ]

    def _take_model(self, config: EngineConfig, local: LocalModel) -> None:
        """After a reload."""
        self.config = config
        self._take_info()

    def _give_up(self, cause: BaseException) -> None:
        """No replica is left, or none can be woken."""
        self._fail(cause)
        self.request_shutdown(by="failure")

    def _fail(self, cause: BaseException) -> None:
        """Remember the first cause, and tell every reader."""
        failure = self._failure = self._failure or str(cause) or type(cause).__name__
        self._router.fail_all(lambda: EngineDead(f"the engine has failed: {failure}"))

    def _finish(self) -> None:
        """Write the report and the last line of the log."""
        workers = [stopped for replica in self._fleet.replicas for stopped in replica.group.stop_reports]
        self.report = self._stop.account(
            self.report, self._child_reports, workers, self._failure, started=self._started
        )
        self._state.advance(EngineState.FAILED if self._failure is not None else EngineState.STOPPED)
        say = log.info if self._started else log.debug  # a failure to start is said by whoever catches it
        say("engine stopped", report=str(self.report))


@asynccontextmanager
async def open_engine(
    config: EngineConfig,
    *,
    first_children: Sequence[ChildSpec] = (),
    transport: OpenTransport | None = None,
    find_model: Callable[[EngineConfig], LocalModel] | None = None,
) -> AsyncIterator[Engine]:
    """Start an engine, and stop it in order on leaving; the arguments are those of `Engine`.

    If the engine fails beyond its restart limits, the block is cancelled and `EngineDead` raised.

    Raises:
        UllmError: it could not start; one line that names the cause and the remedy.
        StartCancelled: a stop was asked for before it had started.
        EngineDead: it failed while it ran.
    """
    engine = Engine(config, first_children=first_children, transport=transport, find_model=find_model)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            try:
                yield engine
            finally:
                engine.request_shutdown(by="the end of its block")
                with trio.CancelScope(shield=True):
                    await engine.wait_stopped()
    except BaseExceptionGroup as group:
        raise _only_error(group) from None


def _only_error(error: BaseException) -> BaseException:
    """The error itself where there is just one; trio wraps each in a group."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def find_local_model(config: EngineConfig) -> LocalModel:
    """`resolve` in a thread of trio's, which ends soon when the start is cancelled."""
    return resolve(config, lambda label, done, total: trio.from_thread.check_cancelled())
