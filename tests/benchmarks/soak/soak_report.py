"""A long run as Markdown and JSON."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec

from tests.benchmarks.soak.judge import COSTS, Finding, Reading, Tolerance, typical
from tests.benchmarks.soak.sample import Sample

PARTS = 10
"""Number of rows in the table of the run's course."""


class SoakReport(msgspec.Struct, frozen=True):
    """A finished run.

    Args:
        command: the server's command.
        counts: way in which requests ended → number of requests.
        compared: number of requests between the beginning and the end that are compared.
        complaints: what happened but must not.
    """

    when: str
    machine: dict[str, Any]
    command: list[str]
    streams: int
    seconds: float
    warm_up: float
    tolerance: Tolerance
    counts: dict[str, int]
    compared: int
    findings: list[Finding]
    complaints: list[str]
    samples: list[Sample]
    readings: list[Reading]

    @property
    def good(self) -> bool:
        """True if every cost stayed flat and there are no complaints."""
        return not self.complaints and all(finding.good for finding in self.findings)

    def json(self) -> str:
        """Return the whole report as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    def markdown(self) -> str:
        """Return heading, verdicts and course."""
        parts = [self._heading(), self._verdicts(), self._explanation(), self._course()]
        return "\n\n".join([*parts, *(f"- {complaint}" for complaint in self.complaints)]) + "\n"

    def _heading(self) -> str:
        on, counts = self.machine, ", ".join(f"{count} {how}" for how, count in self.counts.items())
        return (
            f"{self.when[:10]}, {on['cores']} cores ({on['processor']}), {on['platform']}; "
            f"{self.streams} streams for {self.seconds / 60:.1f} minutes; requests: {counts}. "
            f"Server: `{' '.join(self.command[1:])}`"
        )

    def _verdicts(self) -> str:
        rows = [["", "first tenth", "last tenth", "change", "beside the yardstick", "allowed", ""]]
        for each in self.findings:
            name = f"{each.name}, {each.unit}" if each.unit else each.name
            beside = "" if each.beside is None else f"{each.beside:+.1%}"
            numbers = [number(value) for value in (each.first, each.last)]
            last = [number(each.allowed), "flat" if each.good else "**worse**"]
            rows.append([name, *numbers, f"{each.change:+.1%}", beside, *last])
        return table(rows)

    def _explanation(self) -> str:
        return (
            f"First and last tenth after {self.warm_up:.0%} of warm-up, {self.compared} requests apart. "
            "Rates and processor time: the better quartile of the intervals; memory and descriptors: the "
            "median. Processor time has grown only if it also grew in relation to a fixed piece of work "
            "beside it."
        )

    def _course(self) -> str:
        rows = [["minutes", "requests", *(f"{c.name}, {c.unit}" if c.unit else c.name for c in COSTS)]]
        for part in split(self.readings, PARTS):
            values = [number(typical(cost, part)) for cost in COSTS]
            rows.append([f"{part[-1].seconds / 60:.1f}", str(part[-1].requests), *values])
        return table(rows)


def split(readings: Sequence[Reading], parts: int) -> list[Sequence[Reading]]:
    """Split readings into at most ``parts`` consecutive runs of nearly equal length."""
    parts = min(parts, len(readings))
    edges = [round(i * len(readings) / parts) for i in range(parts + 1)]
    return [readings[a:b] for a, b in itertools.pairwise(edges)]


def number(value: float) -> str:
    """Return a number with about three digits."""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is the heading, numbers are aligned to the right."""
    ruled = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in ruled)
