"""The orderly stop of an engine: one absolute deadline, and stages that pass on the time they do not need.

drain → abort → stop of the tree. Anybody may request a stop at any time; a further request can only make it
sooner. The seconds are those of `ullm.protocol.stop_budget`.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from ullm.actors.transports import StopReport
from ullm.engine.current_model import CurrentModel
from ullm.engine.life import EngineLife
from ullm.engine.lifecycle import AWAKE
from ullm.engine.readers import Readers
from ullm.engine.requests import OwnsRequests, Wakes
from ullm.engine.shutdown_report import ShutdownReport, StageReport, stages_of
from ullm.engine.state import EngineState
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.supervision import ChildReport, Supervisor

log = get_logger(__name__)


class EngineStop:
    """The only owner of an engine's stop: of its deadline, its stages and its report.

    Args:
        life: whose state it advances, from `EngineState.DRAINING` on.

    Attributes:
        requested: set when a stop has been requested.
        starting: the start of the engine runs in this scope, which a stop cancels.
        report: how the stop went; None until the engine is gone.
    """

    def __init__(
        self, current: CurrentModel, life: EngineLife, router: OwnsRequests, readers: Readers
    ) -> None:
        self.requested = trio.Event()
        self.starting = trio.CancelScope()
        self.report: ShutdownReport | None = None
        self._current = current
        self._life = life
        self._router = router
        self._readers = readers
        self._by = ""
        self._forced_by: int | None = None
        self._since_request: _Stopwatch | None = None
        self._deadline = float("inf")
        self._draining = trio.CancelScope()
        self._hurried = False
        self._drained = self._aborted = 0
        self._stages: list[StageReport] = []
        self._children: Sequence[ChildReport] = ()
        self._finished = trio.Event()

    # --- requesting it -----------------------------------------------------------------------------------

    def request(self, timeout: float | None, by: str) -> None:
        """Request the stop; return at once.

        Args:
            timeout: seconds from now until all is gone; None: the configuration's.
            by: the origin of the request, for the report; the first one counts.
        """
        now = trio.current_time()
        seconds = self._current.config.shutdown_timeout if timeout is None else timeout
        self._deadline = min(self._deadline, now + stop_budget.engine_seconds(seconds))
        self._draining.deadline = min(self._draining.deadline, now + stop_budget.drain_seconds(seconds))
        self._by = self._by or by
        self._since_request = self._since_request or _Stopwatch()
        self.requested.set()
        if self._life.state is EngineState.STARTING:
            self.starting.cancel()

    def hurry(self, by: str = "shutdown()") -> None:
        """End all requests now, and stop in order."""
        self._hurried = True
        self.request(0.0, by)
        self._draining.cancel()

    def force(self, signal_number: int) -> None:
        """Note that this signal cuts the stop short; hurry."""
        self._forced_by = signal_number
        self.hurry()

    def fail(self, cause: BaseException) -> None:
        """Remember why the engine fails, and tell every reader."""
        self._life.fail(cause)
        self._router.fail_all(self._life.dead)

    def give_up(self, cause: BaseException) -> None:
        """Fail and stop: no replica is left, or none can be woken."""
        self.fail(cause)
        self.request(None, by="failure")

    # --- carrying it out -----------------------------------------------------------------------------------

    async def run(self, root: Supervisor, lifecycle: Wakes) -> None:
        """Drain, abort, stop the tree: each stage until the deadline at most, the next as soon as it can.

        Args:
            lifecycle: wakes an engine that is asleep, so that requests it has kept can be drained.
        """
        live = self._router.live
        self._life.cell.advance(EngineState.DRAINING)
        log.info("draining", requests=live, by=self._by)
        stages = [await self._drain(lifecycle)]
        aborted = 0
        if stages[0].outcome != "done":
            aborted, stage = await self._abort()
            stages.append(stage)
        self._life.cell.advance(EngineState.STOPPING)
        self._children = await root.stop(self._deadline)
        self._drained, self._aborted = live - aborted, aborted
        self._stages = [*stages, *stages_of(self._children)]

    async def _drain(self, lifecycle: Wakes) -> StageReport:
        """Let requests run on until all have ended, or until the time for that is over."""
        stopwatch = _Stopwatch()
        with self._draining:
            async with trio.open_nursery() as nursery:
                if self._router.live and lifecycle.state != AWAKE:
                    nursery.start_soon(lifecycle.wake)
                await self._router.wait_idle()
                await self._readers.wait_none()
                nursery.cancel_scope.cancel()
        cut_short = "hurried" if self._hurried else "timeout"
        outcome = cut_short if self._draining.cancelled_caught else "done"
        return StageReport("drain", stopwatch.seconds(), outcome)

    async def _abort(self) -> tuple[int, StageReport]:
        """End all requests with what they have; return how many, once their readers have read that."""
        self._life.cell.advance(EngineState.ABORTING)
        stopwatch = _Stopwatch()
        aborted = self._router.finish_all("abort")
        with trio.move_on_after(stop_budget.READER_FLUSH) as scope:
            await self._readers.wait_none()
        outcome = "timeout" if scope.cancelled_caught else "done"
        return aborted, StageReport("abort", stopwatch.seconds(), outcome)

    # --- its end -------------------------------------------------------------------------------------------

    def finish(self, workers: Sequence[StopReport]) -> None:
        """Write the report and the last line of the log: the engine is gone, however it came to that.

        Args:
            workers: how each worker ended.
        """
        life = self._life
        self.report = ShutdownReport(
            requested_by=self._by or "failure",
            drained=self._drained,
            aborted=self._aborted,
            killed=_count("killed", self._children, workers),
            abandoned=_count("abandoned", self._children, workers),
            stages=tuple(self._stages),
            seconds=self._since_request.seconds() if self._since_request is not None else 0.0,
            started=life.started or self.requested.is_set(),
            failure=life.failure,
            forced_by=self._forced_by,
        )
        life.cell.advance(EngineState.FAILED if life.failure is not None else EngineState.STOPPED)
        level = log.info if life.started else log.debug  # whoever catches a failure to start reports it
        level("engine stopped", report=str(self.report))
        self._finished.set()

    async def wait_finished(self) -> ShutdownReport:
        """Wait until the engine is gone, whoever requested it."""
        await self._finished.wait()
        assert self.report is not None, "the report is written before the end is announced"
        return self.report


def _count(outcome: str, children: Sequence[ChildReport], workers: Sequence[StopReport]) -> int:
    """Count children and workers that ended this way; a worker's end is its group's doing."""
    outcomes = [worker.outcome for worker in workers]
    for report in children:
        # Not the supervisor of an abandoned child, which is itself reported as killed.
        outcomes += [child.outcome for child in report.children or (report,)]
    return outcomes.count(outcome)


class _Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = trio.current_time()

    def seconds(self) -> float:
        return trio.current_time() - self._began
