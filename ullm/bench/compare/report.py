"""A comparison as Markdown and JSON: medians, and ratios within each round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ullm.bench.compare.candidates import Candidate
from ullm.bench.compare.machine import Limits, ModelShape, roofline
from ullm.bench.compare.run import Turn
from ullm.bench.compare.scenarios import Load, Metric, decode_metric
from ullm.bench.report import machine


class Ratio(msgspec.Struct, frozen=True):
    """How much better a candidate was than the baseline in the same round; above 1 is better."""

    median: float
    min: float
    max: float


class Entry(msgspec.Struct, frozen=True):
    """One candidate's figures for one metric.

    Args:
        values: one per round that it finished.
        ratio: against the baseline, over the rounds that both finished; None of the baseline itself.
    """

    values: list[float]
    median: float
    ratio: Ratio | None


class Line(msgspec.Struct, frozen=True):
    """One metric over all candidates; ``entries`` by name."""

    metric: Metric
    entries: dict[str, Entry]


class Competitor(msgspec.Struct, frozen=True):
    """Who was compared. ``bounds``: streams → tokens per second that this machine allows it."""

    name: str
    command: list[str]
    weight_bits: float
    bounds: dict[int, float]


class Comparison(msgspec.Struct, frozen=True):
    """A finished comparison.

    Args:
        unequal: scenarios whose prompts had other numbers of tokens with some server.
    """

    when: str
    machine: dict[str, Any]
    limits: Limits
    shape: ModelShape
    baseline: str
    rounds: int
    output_tokens: int
    competitors: list[Competitor]
    lines: list[Line]
    unequal: list[str]
    errors: list[str]

    def json(self) -> str:
        """Everything."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def markdown(self) -> str:
        """Two tables: figures, and ratios to the baseline."""
        names = [competitor.name for competitor in self.competitors]
        others = [name for name in names if name != self.baseline]
        parts = [self._heading(), _table(names, self.lines, self._figure)]
        if others:
            parts += [
                f"Against {self.baseline}, round by round: median (least–most); above 1 is better.",
                _table(others, self.lines, _ratio_cell),
            ]
        parts += [self._commands(), *(f"Not measured: {error}" for error in self.errors)]
        if self.unequal:
            parts.append(f"Prompts were not equally long in: {', '.join(self.unequal)}.")
        return "\n\n".join(parts) + "\n"

    def _heading(self) -> str:
        on, limits = self.machine, self.limits
        return (
            f"{self.when[:10]}, {on['cores']} cores ({on['processor']}), {on['platform']}; memory read at "
            f"{limits.bandwidth / 1e9:.0f} GB/s, matrices multiplied at "
            f"{limits.arithmetic / 1e12:.2f} TFLOP/s. Medians of {self.rounds} rounds, one server at a time, "
            f"{self.output_tokens} new tokens a stream, over HTTP with server-sent events. "
            "In brackets: share of the roofline for that server's weights."
        )

    def _commands(self) -> str:
        return "\n".join(f"- {c.name}: `{' '.join(c.command)}`" for c in self.competitors)

    def _figure(self, line: Line, name: str) -> str:
        entry, bound = line.entries.get(name), self.bound(name, line.metric)
        if entry is None:
            return "–"
        return _number(entry.median) + (f" ({entry.median / bound:.0%})" if bound else "")

    def bound(self, name: str, metric: Metric) -> float | None:
        """What the machine allows a candidate, for decode metrics."""
        bounds = next(c.bounds for c in self.competitors if c.name == name)
        return next((value for streams, value in bounds.items() if decode_metric(streams) == metric), None)


def compare(
    candidates: Sequence[Candidate],
    turns: Sequence[Turn],
    load: Load,
    baseline: str,
    shape: ModelShape,
    limits: Limits,
) -> Comparison:
    """Condense the turns."""
    context = load.prompt_tokens + load.output_tokens / 2
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
        shape=shape,
        baseline=baseline,
        rounds=1 + max((turn.round for turn in turns), default=-1),
        output_tokens=load.output_tokens,
        competitors=competitors,
        lines=[_line(metric, turns, baseline) for metric in metrics],
        unequal=_unequal(turns),
        errors=[f"{turn.candidate}, round {turn.round + 1}: {turn.error}" for turn in turns if turn.error],
    )


def _line(metric: Metric, turns: Sequence[Turn], baseline: str) -> Line:
    found: dict[str, dict[int, float]] = {}
    for turn in turns:
        if turn.figures is not None and metric in turn.figures.values:
            found.setdefault(turn.candidate, {})[turn.round] = turn.figures.values[metric]
    base = found.get(baseline, {})
    return Line(
        metric,
        {
            name: Entry(
                list(values.values()),
                statistics.median(values.values()),
                None if name == baseline else _ratio_of(metric, values, base),
            )
            for name, values in found.items()
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
    return sorted({scenario for (_, scenario), found in counts.items() if len(found) > 1})


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _ratio_cell(line: Line, name: str) -> str:
    entry = line.entries.get(name)
    if entry is None or entry.ratio is None:
        return "–"
    return f"{entry.ratio.median:.2f} ({entry.ratio.min:.2f}–{entry.ratio.max:.2f})"


def _table(names: Sequence[str], lines: Sequence[Line], cell: Callable[[Line, str], str]) -> str:
    rows = [["", *names], ["---", *["---:"] * len(names)]]
    for line in lines:
        rows.append([f"{line.metric.name}, {line.metric.unit}", *(cell(line, name) for name in names)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
