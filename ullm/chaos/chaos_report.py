"""The report of a chaos run, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ullm.chaos.verify import Verdict
from ullm.chaos.world import FaultKind, InjectedFault, World

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
    """One injected fault; ``seconds`` count from the first one."""

    number: int
    kind: str
    seconds: float
    detail: str


class ChaosReport(msgspec.Struct, frozen=True):
    """A finished chaos run.

    Args:
        longest_gaps: the longest silences of streams: start, from the first fault, and duration in seconds.
    """

    seed: int
    kinds: list[KindReport]
    faults: list[FaultRecord]
    answered: int
    refused: int
    verdicts: list[Verdict]
    violations: list[str]
    longest_gaps: list[tuple[float, float]]

    @classmethod
    def of(
        cls, seed: int, world: World, verdicts: Sequence[Verdict], kinds: Iterable[FaultKind]
    ) -> ChaosReport:
        """Build the report of a run; kinds that were never drawn are listed with 0."""
        gaps = sorted(gap for answer in world.answers for gap in answer.gaps)
        first = world.faults[0].at if world.faults else 0.0
        return cls(
            seed,
            [_kind(kind.name, world.faults, gaps) for kind in kinds],
            [FaultRecord(f.number, f.kind, round(f.at - first, 3), f.detail) for f in world.faults],
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


def _length(gap: tuple[float, float]) -> float:
    return gap[1] - gap[0]


def _kind(name: str, faults: Sequence[InjectedFault], gaps: Sequence[tuple[float, float]]) -> KindReport:
    times = [fault.at for fault in faults if fault.kind == name]
    near = [end - begin for begin, end in gaps if any(begin - NEAR <= at <= end for at in times)]
    return KindReport(name, len(times), max(near, default=None))
