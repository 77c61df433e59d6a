"""A comparison as Markdown and JSON: medians, and ratios within each round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from tests.benchmarks.compare.candidates import ServerCandidate
from tests.benchmarks.compare.comparison_rounds import Turn
from tests.benchmarks.compare.hardware import (
    Limits,
    ModelShape,
    describe,
    machine,
    median_limits,
    roofline,
)
from tests.benchmarks.compare.scenarios import ComparisonLoad, Metric, decode_metric


class Ratio(msgspec.Struct, frozen=True):
    """A candidate's figures over the baseline's in the same round; above 1 is better."""

    median: float
    min: float
    max: float


class Entry(msgspec.Struct, frozen=True):
    """One candidate's figures for one metric.

    Args:
        values: one per round that it finished.
        ratio: ratio to the baseline, over the rounds that both finished; None for the baseline itself.
        share: median share of the roofline in the same round; None without a roofline.
    """

    values: list[float]
    median: float
    ratio: Ratio | None
    share: float | None


class Line(msgspec.Struct, frozen=True):
    """One metric over all candidates; ``entries`` by name."""

    metric: Metric
    entries: dict[str, Entry]


class Competitor(msgspec.Struct, frozen=True):
    """A server that was compared; ``bounds``: streams → maximum tokens per second on this machine."""

    name: str
    command: list[str]
    weight_bits: float
    bounds: dict[int, float]


class Comparison(msgspec.Struct, frozen=True):
    """A finished comparison.

    Args:
        limits: the machine's limits, medians of those measured before each candidate's turn.
        bandwidths: bytes per second read from memory before each turn.
        unequal: scenarios whose prompts differed in tokens between servers.
    """

    when: str
    machine: dict[str, Any]
    limits: Limits
    bandwidths: list[float]
    shape: ModelShape
    baseline: str
    rounds: int
    output_tokens: int
    competitors: list[Competitor]
    lines: list[Line]
    unequal: list[str]
    errors: list[str]

    def json(self) -> str:
        """Return the whole comparison as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def markdown(self) -> str:
        """Return two tables: figures, and ratios to the baseline."""
        names = [competitor.name for competitor in self.competitors]
        others = [name for name in names if name != self.baseline]
        parts = [self._heading(), table_of(names, self.lines, figure_cell)]
        if others:
            parts += [
                f"Against {self.baseline}, round by round: median (least–most); above 1 is better.",
                table_of(others, self.lines, ratio_cell),
            ]
        parts += [self._commands(), *(f"Not measured: {error}" for error in self.errors)]
        if self.unequal:
            parts.append(f"Prompts were not equally long in: {', '.join(self.unequal)}.")
        return "\n\n".join(parts) + "\n"

    def _heading(self) -> str:
        read = [each / 1e9 for each in self.bandwidths]
        return (
            f"{self.when[:10]}, {describe(self.machine)}; {self.limits}, the former from {min(read):.0f} to "
            f"{max(read):.0f}. Medians of {self.rounds} rounds, one server at a time, "
            f"{self.output_tokens} new tokens a stream, over HTTP with server-sent events. "
            "In brackets: share of the roofline for its weights, by the limits measured just before."
        )

    def _commands(self) -> str:
        return "\n".join(f"- {c.name}: `{' '.join(c.command)}`" for c in self.competitors)


def condense(
    candidates: Sequence[ServerCandidate],
    turns: Sequence[Turn],
    load: ComparisonLoad,
    baseline: str,
    shape: ModelShape,
) -> Comparison:
    """Condense the turns."""
    context = load.prompt_tokens + load.output_tokens / 2
    limits = median_limits([turn.limits for turn in turns])
    bits = {each.name: each.weight_bits for each in candidates}

    def bound(turn: Turn, streams: int) -> float:
        return roofline(streams, shape, turn.limits, bits[turn.candidate], context)

    bounds = {decode_metric(n): (lambda turn, n=n: bound(turn, n)) for n in load.levels}
    competitors = [
        Competitor(
            each.name,
            list(each.arguments),
            round(each.weight_bits, 2),
            {n: roofline(n, shape, limits, each.weight_bits, context) for n in load.levels},
        )
        for each in candidates
    ]
    metrics = list(dict.fromkeys(m for turn in turns if turn.figures for m in turn.figures.values))
    return Comparison(
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=machine(),
        limits=limits,
        bandwidths=[turn.limits.bandwidth for turn in turns],
        shape=shape,
        baseline=baseline,
        rounds=1 + max((turn.round for turn in turns), default=-1),
        output_tokens=load.output_tokens,
        competitors=competitors,
        lines=[line_of(metric, turns, baseline, bounds.get(metric)) for metric in metrics],
        unequal=_unequal(turns),
        errors=[f"{turn.candidate}, round {turn.round + 1}: {turn.error}" for turn in turns if turn.error],
    )


def line_of(
    metric: Metric, turns: Sequence[Turn], baseline: str, bound: Callable[[Turn], float] | None
) -> Line:
    """Condense one metric over all turns.

    Args:
        bound: returns the roofline of a turn; None for a metric without a roofline.
    """
    by_candidate: dict[str, dict[int, float]] = {}
    shares: dict[str, list[float]] = {}
    for turn in turns:
        if turn.figures is not None and metric in turn.figures.values:
            value = turn.figures.values[metric]
            by_candidate.setdefault(turn.candidate, {})[turn.round] = value
            if bound is not None:
                shares.setdefault(turn.candidate, []).append(value / bound(turn))
    base = by_candidate.get(baseline, {})
    return Line(
        metric,
        {
            name: Entry(
                list(values.values()),
                statistics.median(values.values()),
                None if name == baseline else _ratio_of(metric, values, base),
                statistics.median(shares[name]) if bound is not None else None,
            )
            for name, values in by_candidate.items()
        },
    )


def _ratio_of(metric: Metric, values: dict[int, float], base: dict[int, float]) -> Ratio | None:
    pairs = [(values[number], base[number]) for number in values if number in base]
    ratios = [a / b if metric.better == "higher" else b / a for a, b in pairs if a and b]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def _unequal(turns: Sequence[Turn]) -> list[str]:
    counts: dict[tuple[int, str], set[int]] = {}
    for turn in turns:
        for scenario, count in (turn.figures.prompt_tokens if turn.figures else {}).items():
            counts.setdefault((turn.round, scenario), set()).add(count)
    return sorted({scenario for (_, scenario), different in counts.items() if len(different) > 1})


def shown(value: float) -> str:
    """Return a figure with up to three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def figure_cell(line: Line, name: str) -> str:
    """Return a candidate's median, with its share of the roofline in brackets."""
    entry = line.entries.get(name)
    if entry is None:
        return "–"
    return shown(entry.median) + (f" ({entry.share:.0%})" if entry.share is not None else "")


def ratio_cell(line: Line, name: str) -> str:
    """Return a candidate's ratio to the baseline."""
    entry = line.entries.get(name)
    if entry is None or entry.ratio is None:
        return "–"
    return f"{entry.ratio.median:.2f} ({entry.ratio.min:.2f}–{entry.ratio.max:.2f})"


def table_of(names: Sequence[str], lines: Sequence[Line], cell: Callable[[Line, str], str]) -> str:
    """Return a Markdown table: a row per metric, a column per candidate."""
    rows = [["", *names], ["---", *["---:"] * len(names)]]
    for line in lines:
        rows.append([f"{line.metric.name}, {line.metric.unit}", *(cell(line, name) for name in names)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
