"""The report of a chaos run, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import ullm
from ullm.chaos.chaos_plan import ChaosPlan
from ullm.chaos.schedule import Moment
from ullm.chaos.verify import Verdict
from ullm.chaos.world import FaultKind, InjectedFault, World
from ullm.errors import ResourceUnavailable
from ullm.faults import FiredFault

NEAR = 0.5
"""Seconds after a fault within which a silence that begins is attributed to it."""
LONGEST = 10
"""Number of silences that the JSON lists."""
SHOWN = 20
"""Number of violations that the table shows."""


class KindReport(msgspec.Struct, frozen=True):
    """One kind of fault.

    Args:
        longest_gap: longest silence of a stream around such a fault, in seconds; None if all were below
            50 ms. Faults overlap, so that another one may have contributed.
    """

    name: str
    count: int
    longest_gap: float | None


class FaultRecord(msgspec.Struct, frozen=True):
    """One injected fault.

    Args:
        seconds: since the first one.
        burst: how many were injected in the same moment, this one included.
    """

    number: int
    kind: str
    seconds: float
    detail: str
    burst: int = 1


class ChaosReport(msgspec.Struct, frozen=True):
    """A finished chaos run, which can be run again.

    Args:
        version: ullm's.
        options: of the run, as fields of `ChaosPlan`.
        plan: what the seed has drawn, up to the last fault.
        texts: the undisturbed answers, one list for each request.
        skipped: faults of the plan that were not injected, and why.
        fired: what the server has injected into itself, and what came of it.
        longest_gaps: the longest silences of streams: start, from the first fault, and duration in seconds.
    """

    version: str
    seed: int
    options: dict[str, Any]
    plan: list[Moment]
    texts: list[list[str]]
    kinds: list[KindReport]
    faults: list[FaultRecord]
    skipped: list[str]
    fired: list[FiredFault]
    answered: int
    refused: int
    verdicts: list[Verdict]
    violations: list[str]
    longest_gaps: list[tuple[float, float]]

    @classmethod
    def of(
        cls, plan: ChaosPlan, world: World, verdicts: Sequence[Verdict], kinds: Iterable[FaultKind]
    ) -> ChaosReport:
        """Build the report of a run; kinds that were never drawn are listed with 0."""
        gaps = sorted(gap for answer in world.answers for gap in answer.gaps)
        first = world.faults[0].at if world.faults else 0.0
        return cls(
            ullm.__version__,
            plan.seed,
            _options(plan),
            world.begun,
            [list(world.expected[number].texts) for number in sorted(world.expected)],
            [_kind(kind.name, world.faults, gaps) for kind in kinds],
            [FaultRecord(f.number, f.kind, round(f.at - first, 3), f.detail, f.burst) for f in world.faults],
            world.skipped,
            world.fired,
            world.counts["answered"],
            world.counts["refused"],
            list(verdicts),
            world.violations,
            [
                (round(begin - first, 3), round(end - begin, 3))
                for begin, end in sorted(gaps, key=_length, reverse=True)[:LONGEST]
            ],
        )

    @property
    def good(self) -> bool:
        """True if every verdict holds."""
        return all(verdict.good for verdict in self.verdicts)

    @property
    def repeatable(self) -> dict[str, Any]:
        """What another run of the same seed has as well: all that does not depend on when things happen."""
        return {
            "version": self.version,
            "seed": self.seed,
            "options": self.options,
            "plan": self.plan,
            "texts": self.texts,
            "verdicts": [(verdict.what, verdict.good) for verdict in self.verdicts],
        }

    @staticmethod
    def read(file: Path) -> ChaosReport:
        """Read a report, for ``--replay``.

        Raises:
            ResourceUnavailable: it cannot be read, or is no report.
        """
        try:
            return msgspec.json.decode(file.read_bytes(), type=ChaosReport)
        except OSError as error:
            raise ResourceUnavailable(f"--replay {file}: {error.strerror}") from None
        except msgspec.DecodeError as error:
            raise ResourceUnavailable(f"--replay {file}: not a report of ullm chaos: {error}") from None

    def chaos_plan(self) -> ChaosPlan:
        """Return the run's options, to run it again.

        Raises:
            ResourceUnavailable: they are not those of this version.
        """
        try:
            return msgspec.convert(self.options, ChaosPlan)
        except msgspec.ValidationError as error:
            raise ResourceUnavailable(
                f"--replay: a report of ullm {self.version} with other options: {error}"
            ) from None

    def json(self) -> str:
        """Return the whole report as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def show(self, console: Console) -> None:
        """Print the faults by kind, then the verdicts."""
        table = Table(title=f"seed {self.seed}: {len(self.faults)} faults", box=SIMPLE_HEAD)
        for column, justify in (("fault", "left"), ("count", "right"), ("longest gap, ms", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for kind in self.kinds:
            gap = "–" if kind.longest_gap is None else f"{kind.longest_gap * 1000:.0f}"
            table.add_row(kind.name, str(kind.count), gap)
        console.print(table)
        for verdict in self.verdicts:
            mark = "[green]holds[/]" if verdict.good else "[red]VIOLATED[/]"
            console.print(f"{mark}  {verdict.what}" + (f" ({verdict.detail})" if verdict.detail else ""))
        for violation in self.violations[:SHOWN]:
            console.print(f"  {violation}", markup=False)


def _options(plan: ChaosPlan) -> dict[str, Any]:
    """Return the fields of a plan, as JSON has them."""
    options: dict[str, Any] = msgspec.to_builtins(plan)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _length(gap: tuple[float, float]) -> float:
    return gap[1] - gap[0]


def _kind(name: str, faults: Sequence[InjectedFault], gaps: Sequence[tuple[float, float]]) -> KindReport:
    times = [fault.at for fault in faults if fault.kind == name]
    near = [end - begin for begin, end in gaps if any(begin - NEAR <= at <= end for at in times)]
    return KindReport(name, len(times), max(near, default=None))
