"""The orderly stop of an engine: one absolute deadline, and stages that pass on the time they do not need.

drain → abort → stop of the tree. A stop may be asked for at any time and by anybody; asking again can only
make it sooner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import trio

from ullm.actors.router import Router
from ullm.actors.transports import StopReport
from ullm.config import EngineConfig
from ullm.engine.generation import Readers
from ullm.engine.lifecycle import AWAKE, Lifecycle
from ullm.logs import get_logger
from ullm.protocol import stop_budget
from ullm.supervision import (
    ChildReport,
    EngineState,
    ShutdownReport,
    StageReport,
    StateCell,
    Supervisor,
    stages_of,
)

log = get_logger("ullm.engine")


class Stop:
    """See the module.

    Args:
        state: the engine's; this is who writes it from `EngineState.DRAINING` on.

    Attributes:
        requested: set when a stop has been asked for.
        forced_by: number of the signal that forced it.
    """

    def __init__(
        self,
        config: EngineConfig,
        state: StateCell,
        router: Router,
        readers: Readers,
        lifecycle: Lifecycle,
    ) -> None:
        self.requested = trio.Event()
        self.forced_by: int | None = None
        self._config = config
        self._state = state
        self._router = router
        self._readers = readers
        self._lifecycle = lifecycle
        self._by = ""
        self._asked: _Clock | None = None
        self._deadline = float("inf")
        self._draining = trio.CancelScope()

    def request(self, timeout: float | None, by: str) -> None:
        """Ask for the stop.

        Args:
            timeout: seconds from now until all is gone; None: the configuration's.
        """
        seconds = self._config.shutdown_timeout if timeout is None else timeout
        # Ending requests and children in order takes time even where draining is given none.
        self._deadline = min(self._deadline, trio.current_time() + stop_budget.engine_seconds(seconds))
        drain_until = trio.current_time() + stop_budget.drain_seconds(seconds)
        self._draining.deadline = min(self._draining.deadline, drain_until)
        self._by = self._by or by
        self._asked = self._asked or _Clock()
        self.requested.set()

    def skip_drain(self) -> None:
        """End all requests now."""
        self._draining.cancel()

    async def run(self, root: Supervisor) -> tuple[ShutdownReport, Sequence[ChildReport]]:
        """Drain, abort, stop: each stage until the one deadline at most, the next as soon as it can."""
        stages: list[StageReport] = []
        live = self._router.live
        self._state.advance(EngineState.DRAINING)
        log.info("draining", requests=live, by=self._by)
        aborted = 0
        if not await self._drain(stages):
            aborted = await self._abort(stages)
        self._state.advance(EngineState.STOPPING)
        reports = await root.stop(self._deadline)
        drained = live - aborted
        report = ShutdownReport(self._by, drained, aborted, stages=(*stages, *stages_of(reports)))
        return report, reports

    async def _drain(self, stages: list[StageReport]) -> bool:
        """Let requests run on, those that are kept asleep as well; whether all have ended."""
        clock = _Clock()
        with self._draining:
            async with trio.open_nursery() as nursery:
                if self._router.live and self._lifecycle.state != AWAKE:
                    nursery.start_soon(self._lifecycle.wake)
                await self._router.wait_idle()
                await self._readers.wait_none()
                nursery.cancel_scope.cancel()
        over = self._draining.cancelled_caught
        stages.append(StageReport("drain", clock.seconds(), "timeout" if over else "done"))
        return not over

    async def _abort(self, stages: list[StageReport]) -> int:
        self._state.advance(EngineState.ABORTING)
        clock = _Clock()
        aborted = self._router.finish_all("abort")
        with trio.move_on_after(stop_budget.READER_FLUSH) as scope:
            await self._readers.wait_none()
        stages.append(StageReport("abort", clock.seconds(), "timeout" if scope.cancelled_caught else "done"))
        return aborted

    def account(
        self,
        report: ShutdownReport | None,
        children: Sequence[ChildReport],
        workers: Sequence[StopReport],
        failure: str | None,
        *,
        started: bool,
    ) -> ShutdownReport:
        """The whole report.

        Args:
            report: of `run`; None if it did not come to that.
            children, workers: how each of them ended.
        """
        return replace(
            report or ShutdownReport(requested_by=self._by or "failure"),
            killed=_count("killed", children, workers),
            abandoned=_count("abandoned", children, workers),
            seconds=self._asked.seconds() if self._asked is not None else 0.0,
            started=started or self.requested.is_set(),
            failure=failure,
            forced_by=self.forced_by,
        )


def _count(outcome: str, children: Sequence[ChildReport], workers: Sequence[StopReport]) -> int:
    """Children and workers that ended this way; a worker's end is its group's doing."""
    ended = [worker.outcome for worker in workers]
    for report in children:
        # Not the supervisor of an abandoned child, which is called killed for it.
        ended += [child.outcome for child in report.children or (report,)]
    return ended.count(outcome)


class _Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = trio.current_time()

    def seconds(self) -> float:
        return trio.current_time() - self._began
