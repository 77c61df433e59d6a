"""The report of an engine's stop: what became of requests and children, how long it took, the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ullm.protocol.exit_codes import (
    EXIT_ABANDONED,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_SIGNAL_BASE,
    EXIT_START_FAILED,
)
from ullm.supervision import ChildReport


@dataclass(frozen=True)
class StageReport:
    """One stage of a stop: ``drain``, ``abort``, or the id of a child.

    Args:
        outcome: of drain and abort: ``done``; ``timeout``: its time was used up; ``hurried``: a second signal
            or `Engine.expedite` cut the drain short. Otherwise as in `ChildReport`.
    """

    name: str
    seconds: float
    outcome: str = "done"


@dataclass(frozen=True)
class ShutdownReport:
    """How an engine stopped, for the last line of the log and for the exit code.

    Args:
        requested_by: ``SIGTERM``, ``admin``, ``shutdown()``, ``cancelled``, ``failure``, …
        drained: requests that ended by themselves after the stop was asked for.
        aborted: requests that were ended early.
        killed: children that used up their budget and were ended by force.
        abandoned: children that could not be ended.
        stages: the stages in order.
        seconds: from the request to the end.
        started: False if the stop was due to a failure to start.
        failure: one line that says why the engine failed beyond its restart limits; None if it did not.
        forced_by: number of the signal that cut the stop short.
    """

    requested_by: str
    drained: int = 0
    aborted: int = 0
    killed: int = 0
    abandoned: int = 0
    stages: tuple[StageReport, ...] = ()
    seconds: float = 0.0
    started: bool = True
    failure: str | None = None
    forced_by: int | None = None

    @property
    def exit_code(self) -> int:
        """0 in order, 1 could not start, 70 failed, 71 left something behind, 128+N forced by signal N."""
        if self.forced_by is not None:
            return EXIT_SIGNAL_BASE + self.forced_by
        if not self.started:
            return EXIT_START_FAILED
        if self.failure is not None:
            return EXIT_FAILED
        return EXIT_ABANDONED if self.abandoned else EXIT_OK

    def __str__(self) -> str:
        """Return one line: the requester, requests and children by outcome, seconds of each stage."""
        counts = ", ".join(
            f"{getattr(self, name)} {name}" for name in ("drained", "aborted", "killed", "abandoned")
        )
        stages = ", ".join(f"{stage.name} {stage.seconds:.2f} s {stage.outcome}" for stage in self.stages)
        parts = [f"stopped in {self.seconds:.2f} s by {self.requested_by}: {counts}"]
        parts += [stages] if stages else []
        parts += [f"failure: {self.failure}"] if self.failure is not None else []
        return "; ".join([*parts, f"exit code {self.exit_code}"])


def stages_of(reports: Sequence[ChildReport]) -> tuple[StageReport, ...]:
    """Return the children's part of `ShutdownReport.stages`."""
    return tuple(StageReport(report.child_id, report.seconds, report.outcome) for report in reports)
