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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import trio

from ullm.actors.router import Router
from ullm.actors.tokenizer import Tokenizer
from ullm.actors.transports import OpenTransport, open_transport
from ullm.config import EngineConfig
from ullm.errors import EngineDead, EngineDraining, EngineNotReady, StartCancelled, first_cause
from ullm.generation import Generation, Readers
from ullm.health import EngineStatistics, Health
from ullm.hub import LocalModel, resolve
from ullm.logs import get_logger
from ullm.messages import ModelInfo
from ullm.replica import TEARDOWN_RESERVE, Replica
from ullm.sampling import SamplingParams
from ullm.supervision import (
    ChildInfo,
    ChildReport,
    ChildSpec,
    EngineState,
    Kind,
    Restart,
    ShutdownReport,
    StageReport,
    StateCell,
    Supervisor,
    open_supervisor,
    stages_of,
)

log = get_logger("ullm.engine")

FLUSH_BUDGET = 1.0
"""Seconds that readers get to take the last outputs of aborted requests."""


class Engine:
    """See the module; made by `open_engine`.

    Args:
        first_children: children that start before all others and stop after them, such as the HTTP
            server, which so can answer probes from the first moment to the last.
        transport: how to start workers, instead of ``config.transport``.
        find_model: what stands in for `find_local_model`; called in a thread.
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
        self._router = Router(config)
        transport = transport or open_transport(config.worker_transport)
        self._replicas = [Replica(index, config, self._router, transport) for index in range(config.replicas)]
        self._failed_replicas: dict[int, BaseException] = {}
        self._root: Supervisor | None = None
        self._readers = Readers()
        self._stop_requested = trio.Event()
        self._stopped = trio.Event()
        self._requested_by = ""
        self._asked: _Clock | None = None
        self._started = False
        self._deadline = float("inf")
        self._starting = trio.CancelScope()
        self._draining = trio.CancelScope()
        self._failure: str | None = None
        self._forced_by: int | None = None

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
        up = self._router.replicas_up
        ready = self.state is EngineState.RUNNING and bool(up)
        waiting_for = "no replica is up" if self.state is EngineState.RUNNING else self.state.value
        return Health(
            state=self.state.value,
            live=self._failure is None,
            ready=ready,
            detail="" if ready else self._failure or waiting_for,
            replicas=[replica.health(up=replica.index in up) for replica in self._replicas],
        )

    def statistics(self) -> EngineStatistics:
        """What is inside, as a frozen value."""
        router = self._router.statistics()
        inside = [found for r in self._replicas if (found := r.scheduler.statistics()) is not None]
        running = sum(s.running for s in inside)
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
            worker_restarts_total=sum(max(0, r.group.epoch - 1) for r in self._replicas),
            requests_resumed_total=router.resumed,
            tokens_resubmitted_total=router.resumed_tokens,
        )

    def children(self) -> tuple[ChildInfo, ...]:
        """The supervision tree as it is now; empty before it is started."""
        return self._root.which_children() if self._root is not None else ()

    # --- stopping ------------------------------------------------------------------------------------------

    def request_shutdown(self, timeout: float | None = None, *, by: str = "shutdown()") -> None:
        """Begin the orderly stop; returns at once. Later calls can only make it sooner.

        Args:
            timeout: seconds from now until all is gone; default: the configuration's.
            by: who asked, for the report.
        """
        seconds = self.config.shutdown_timeout if timeout is None else timeout
        # Ending requests and children in order takes time even where draining is given none.
        self._deadline = min(self._deadline, trio.current_time() + max(seconds, TEARDOWN_RESERVE))
        drain_until = trio.current_time() + max(0.0, seconds - TEARDOWN_RESERVE)
        self._draining.deadline = min(self._draining.deadline, drain_until)
        self._requested_by = self._requested_by or by
        self._asked = self._asked or _Clock()
        self._stop_requested.set()
        if self.state is EngineState.STARTING:
            self._starting.cancel()

    def expedite(self) -> None:
        """Skip the rest of the drain: end all requests now, and stop in order."""
        self.request_shutdown(0.0)
        self._draining.cancel()

    def kill(self, signal_number: int) -> None:
        """Kill the workers; what stops in order after that stops at once."""
        self._forced_by = signal_number
        self.expedite()
        for replica in self._replicas:
            replica.group.kill()

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
                await self._prepare()
                async with open_supervisor(
                    "engine",
                    self._children(),
                    intensity=self.config.max_restarts,
                    period=self.config.restart_period,
                ) as root:
                    self._root = root
                    self._take_info(self._replicas[0].group.info)
                    await self._router.wait_for_replicas(len(self._replicas))
                    self._state.advance(EngineState.RUNNING)
                    self._started = True
                    log.info("engine running", model=self.model_name)
                    task_status.started()
                    await self._stop_requested.wait()
                    self.report = await self._stop(root)
        except BaseException as error:
            cause = first_cause(error)
            if not isinstance(cause, Exception):
                raise
            if self.state is EngineState.STARTING:
                raise cause from error
            self._fail(cause)
        finally:
            self._finish()

    def _take_info(self, info: ModelInfo | None) -> None:
        assert info is not None, "a group that has started knows its model"
        assert self.tokenizer is not None, "the tokenizer is started before the replicas"
        self.info = info
        self.tokenizer.max_tokens = info.context_len

    async def _prepare(self) -> None:
        """Find the model's files, which children need before they start."""
        local = await trio.to_thread.run_sync(self._find_model, self.config)
        self.tokenizer = Tokenizer(local)
        for replica in self._replicas:
            replica.group.model_path = str(local.path)

    def _children(self) -> list[ChildSpec]:
        assert self.tokenizer is not None, "the model is resolved before the tree is started"
        replicas = [
            ChildSpec(
                spec.child_id,
                partial(self._run_replica, replica.index, spec.run),
                restart=Restart.TEMPORARY,
                shutdown=spec.shutdown,
                kind=Kind.SUPERVISOR,
            )
            for replica in self._replicas
            for spec in [replica.spec(self.config)]
        ]
        return [
            *self._first_children,
            ChildSpec("tokenizer", self.tokenizer.run, shutdown=1.0),
            *replicas,
            ChildSpec("router", self._router.run, shutdown=1.0),
        ]

    async def _run_replica(
        self, index: int, supervise: Callable[..., Any], *, task_status: trio.TaskStatus[Any]
    ) -> None:
        """A replica that failed beyond its limits stays down; with the last one, the engine ends."""
        try:
            await supervise(task_status=task_status)
        except Exception as error:
            if self.state is EngineState.STARTING:
                raise
            self._failed_replicas[index] = error
            log.error("replica failed", replica=index, cause=str(first_cause(error)))
            if len(self._failed_replicas) == len(self._replicas):
                self._fail(first_cause(error))
                self.request_shutdown(by="failure")

    def _fail(self, cause: BaseException) -> None:
        """Remember the first cause, and tell every reader."""
        failure = self._failure = self._failure or str(cause) or type(cause).__name__
        self._router.fail_all(lambda: EngineDead(f"the engine has failed: {failure}"))

    async def _stop(self, root: Supervisor) -> ShutdownReport:
        """Drain, abort, stop: each stage until the one deadline at most, the next as soon as it can."""
        stages: list[StageReport] = []
        live = self._router.statistics().live
        self._state.advance(EngineState.DRAINING)
        log.info("draining", requests=live, by=self._requested_by)
        clock = _Clock()
        with self._draining:
            await self._router.wait_idle()
            await self._readers.wait_none()
        stages.append(
            StageReport("drain", clock.seconds(), "timeout" if self._draining.cancelled_caught else "done")
        )
        aborted = await self._abort(stages) if self._draining.cancelled_caught else 0
        self._state.advance(EngineState.STOPPING)
        reports = await root.stop(self._deadline)
        return ShutdownReport(
            requested_by=self._requested_by,
            drained=live - aborted,
            aborted=aborted,
            killed=self._count("killed", reports),
            abandoned=self._count("abandoned", reports),
            stages=(*stages, *stages_of(reports)),
        )

    def _count(self, outcome: str, reports: Sequence[ChildReport]) -> int:
        """Children and workers that ended this way; a worker's end is its group's doing."""
        workers = [stopped for replica in self._replicas for stopped in replica.group.stop_reports]
        ended = [report.outcome for report in workers] + [
            child.outcome for report in reports for child in (report, *report.children)
        ]
        return ended.count(outcome)

    async def _abort(self, stages: list[StageReport]) -> int:
        self._state.advance(EngineState.ABORTING)
        clock = _Clock()
        aborted = self._router.finish_all("abort")
        with trio.move_on_after(FLUSH_BUDGET) as scope:
            await self._readers.wait_none()
        stages.append(StageReport("abort", clock.seconds(), "timeout" if scope.cancelled_caught else "done"))
        return aborted

    def _finish(self) -> None:
        """Write the report and the last line of the log."""
        report = self.report or ShutdownReport(requested_by=self._requested_by or "failure")
        self.report = replace(
            report,
            seconds=self._asked.seconds() if self._asked is not None else 0.0,
            started=self._started or self._stop_requested.is_set(),
            failure=self._failure,
            forced_by=self._forced_by,
        )
        self._state.advance(EngineState.FAILED if self._failure is not None else EngineState.STOPPED)
        say = log.info if self._started else log.debug  # a failure to start is said by whoever catches it
        say("engine stopped", report=str(self.report))


class _Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = trio.current_time()

    def seconds(self) -> float:
        return trio.current_time() - self._began


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
