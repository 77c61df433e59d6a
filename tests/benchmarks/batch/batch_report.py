"""The result as Markdown and JSON: medians, shares of the roofline, and ratios within each round."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from tests.benchmarks.batch.batch_rounds import FinishedRounds
from tests.benchmarks.batch.contenders import Contender
from tests.benchmarks.batch.engine_load import EngineLoad
from tests.benchmarks.compare.comparison import Line, figure_cell, line_of, ratio_cell, table_of
from tests.benchmarks.compare.comparison_rounds import Turn
from tests.benchmarks.compare.hardware import Limits, ModelShape, describe, machine, median_limits
from tests.benchmarks.compare.scenarios import Metric
from ullm.config import EngineConfig


class EngineReport(msgspec.Struct, frozen=True):
    """A finished benchmark of engines without a server.

    Args:
        limits: the device's limits, medians of those measured before each turn.
        load: parameters of the load.
        load_text: the load in one phrase.
        bounds: contender → metric → maximum tokens per second on this device, by ``limits``.
        commands: contender → its Python and options.
        lines: figures of each metric, with ratios to the first baseline.
        ratios: baseline → figures of each metric, with ratios to this baseline.
        errors: contenders that were not measured, and why.
    """

    when: str
    machine: dict[str, Any]
    device: str
    limits: Limits
    model: str
    shape: ModelShape
    load: dict[str, Any]
    load_text: str
    rounds: int
    bounds: dict[str, dict[str, float]]
    commands: dict[str, str]
    lines: list[Line]
    ratios: dict[str, list[Line]]
    errors: list[str]

    def json(self) -> str:
        """Return the whole report as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def markdown(self) -> str:
        """Return tables: figures, and ratios to each baseline."""
        names = list(self.commands)
        parts = [self.heading(), table_of(names, self.lines, figure_cell)]
        for baseline, lines in self.ratios.items():
            others = [name for name in names if name != baseline]
            if others and any(baseline in line.entries for line in lines):
                parts += [
                    f"Against {baseline}, round by round: median (least–most); above 1 is better.",
                    table_of(others, lines, ratio_cell),
                ]
        return "\n\n".join([*parts, *self.ending()]) + "\n"

    def heading(self) -> str:
        """Return the conditions in one paragraph."""
        shape = self.shape
        return (
            f"{self.when[:10]}, {self.device}, {describe(self.machine)}; {self.limits}. {self.model}: "
            f"{shape.parameters / 1e6:.1f} M weights, {shape.kv_bytes / 1e3:.1f} KB of KV per token. "
            f"{self.load_text}. Medians of {self.rounds} rounds, one engine at a time; in brackets the "
            "share of the roofline by the limits measured just before."
        )

    def ending(self) -> list[str]:
        """Return the paragraphs with commands and errors."""
        commands = "\n".join(f"- {name}: `{command}`" for name, command in self.commands.items())
        return [commands, *(f"Not measured: {error}" for error in self.errors)]


def report(
    contenders: Sequence[Contender],
    finished: FinishedRounds,
    load: EngineLoad,
    model: str,
    shape: ModelShape,
    baselines: Sequence[str],
) -> EngineReport:
    """Condense the turns.

    Args:
        model: name of the model in the report.
        baselines: contenders to compare the others with.
    """
    bits, turns = {each.name: each.weight_bits for each in contenders}, finished.turns

    def bounds_at(name: str, number: int, limits: Limits) -> dict[Metric, float]:
        return load.bounds(finished.jobs[number], shape, limits, bits[name])

    def line(metric: Metric, baseline: str) -> Line:
        has_bound = any(metric in bounds_at(each.name, 0, limits) for each in contenders[:1])

        def bound(turn: Turn) -> float:
            return bounds_at(turn.candidate, turn.round, turn.limits)[metric]

        return line_of(metric, turns, baseline, bound if has_bound else None)

    limits = median_limits([turn.limits for turn in turns])
    metrics = list(dict.fromkeys(m for turn in turns if turn.figures for m in turn.figures.values))
    ratios = {baseline: [line(metric, baseline) for metric in metrics] for baseline in baselines}
    return EngineReport(
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=machine(),
        device=finished.device,
        limits=limits,
        model=model,
        shape=shape,
        load=load.settings(),
        load_text=load.describe(),
        rounds=len(finished.jobs),
        bounds={
            each.name: {m.name: round(value, 1) for m, value in bounds_at(each.name, 0, limits).items()}
            for each in contenders
        },
        commands={each.name: _command(each) for each in contenders},
        lines=ratios[baselines[0]],
        ratios=ratios,
        errors=[f"round {turn.round + 1}: {turn.error}" for turn in turns if turn.error],
    )


def _command(contender: Contender) -> str:
    """Return a contender's Python and options, for ullm without those that are defaults."""
    usual = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    options = contender.options.items()
    changed = [f"{key}={value!r}" for key, value in options if contender.is_peer or usual[key] != value]
    return f"{' '.join(contender.python)} {contender.engine}({', '.join(changed)})"
