"""The result as Markdown and JSON: medians, shares of the roofline, and ratios within each round."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from tests.benchmarks.batch.batch_load import BatchLoad, least_seconds
from tests.benchmarks.batch.batch_rounds import LOADING, SECONDS, SINGLE, THROUGHPUT, BatchRound
from tests.benchmarks.batch.contenders import Contender
from tests.benchmarks.compare.comparison import Line, figure_cell, line_of, ratio_cell, table_of
from tests.benchmarks.compare.comparison_rounds import Turn
from tests.benchmarks.compare.hardware import Limits, ModelShape, roofline
from tests.benchmarks.compare.scenarios import Metric
from ullm.bench.bench_report import machine
from ullm.config import EngineConfig


class BatchReport(msgspec.Struct, frozen=True):
    """A finished benchmark.

    Args:
        limits: the device's limits, medians over the rounds.
        bounds: contender → metric → maximum tokens per second on this device in the first round.
        commands: contender → its Python and options.
        errors: contenders that were not measured, and why.
    """

    when: str
    machine: dict[str, Any]
    device: str
    limits: Limits
    model: str
    shape: ModelShape
    load: dict[str, Any]
    rounds: int
    baseline: str
    bounds: dict[str, dict[str, float]]
    commands: dict[str, str]
    lines: list[Line]
    errors: list[str]

    def json(self) -> str:
        """Return the whole report as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def markdown(self) -> str:
        """Return two tables: figures, and ratios to the baseline."""
        names = list(self.commands)
        others = [name for name in names if name != self.baseline]
        parts = [self._heading(), table_of(names, self.lines, figure_cell)]
        if others and any(self.baseline in line.entries for line in self.lines):
            parts += [
                f"Against {self.baseline}, round by round: median (least–most); above 1 is better.",
                table_of(others, self.lines, ratio_cell),
            ]
        parts.append("\n".join(f"- {name}: `{command}`" for name, command in self.commands.items()))
        return "\n\n".join([*parts, *(f"Not measured: {error}" for error in self.errors)]) + "\n"

    def _heading(self) -> str:
        on, limits, load = self.machine, self.limits, self.load
        parts = (
            f"{self.when[:10]}, {self.device}, {on['cores']} cores ({on['processor']}), {on['platform']};",
            f"memory at {limits.bandwidth / 1e9:.0f} GB/s, matrices multiplied at",
            f"{limits.arithmetic / 1e12:.1f} TFLOP/s. {self.model}: {self.shape.parameters / 1e6:.1f} M",
            f"weights, {self.shape.kv_bytes / 1e3:.1f} KB of KV per token.",
            f"{load['requests']} requests at once, prompts of {load['prompt_tokens']} random tokens,",
            f"outputs of {load['output_tokens']}, temperature {load['temperature']:g}.",
            f"Medians of {self.rounds} rounds, one engine at a time; in brackets the share of the roofline.",
        )
        return " ".join(parts)


def report(
    contenders: Sequence[Contender],
    turns: Sequence[Turn],
    batch_rounds: Sequence[BatchRound],
    load: BatchLoad,
    model: str,
    shape: ModelShape,
    baseline: str,
) -> BatchReport:
    """Condense the turns.

    Args:
        batch_rounds: the rounds.
        model: name of the model in the report.
    """
    by_name = {each.name: each for each in contenders}

    def bounds_of(contender: Contender, number: int) -> dict[Metric, float]:
        return most_tokens_per_second(contender, batch_rounds[number], shape, load)

    def bound(metric: Metric, turn: Turn) -> float:
        return bounds_of(by_name[turn.candidate], turn.round)[metric]

    limits = [each.device.limits for each in batch_rounds]
    return BatchReport(
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=machine(),
        device=batch_rounds[0].device.name,
        limits=Limits(
            statistics.median(each.bandwidth for each in limits),
            statistics.median(each.arithmetic for each in limits),
        ),
        model=model,
        shape=shape,
        load=_described(load),
        rounds=len(batch_rounds),
        baseline=baseline,
        bounds={
            each.name: {metric.name: round(value, 1) for metric, value in bounds_of(each, 0).items()}
            for each in contenders
        },
        commands={each.name: _command(each) for each in contenders},
        lines=[
            line_of(THROUGHPUT, turns, baseline, lambda turn: bound(THROUGHPUT, turn)),
            line_of(SECONDS, turns, baseline, None),
            line_of(SINGLE, turns, baseline, lambda turn: bound(SINGLE, turn)),
            line_of(LOADING, turns, baseline, None),
        ],
        errors=[f"round {turn.round + 1}: {turn.error}" for turn in turns if turn.error],
    )


def most_tokens_per_second(
    contender: Contender, batch_round: BatchRound, shape: ModelShape, load: BatchLoad
) -> dict[Metric, float]:
    """Return the rooflines of the metrics that have one."""
    limits, bits, job = batch_round.device.limits, contender.weight_bits, batch_round.job
    alone = job.single[-1]
    context = len(alone.prompt) + alone.max_tokens / 2
    return {
        THROUGHPUT: job.output_tokens / least_seconds(job, shape, limits, bits),
        SINGLE: roofline(1, shape, limits, bits, context),
    }


def _described(load: BatchLoad) -> dict[str, Any]:
    return {
        "requests": load.requests,
        "prompt_tokens": str(load.prompt_tokens),
        "output_tokens": str(load.output_tokens),
        "single_tokens": load.single_tokens,
        "temperature": load.temperature,
        "seed": load.seed,
    }


def _command(contender: Contender) -> str:
    """Return a contender's Python and options, for ullm without those that are defaults."""
    usual = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    options = contender.options.items()
    changed = [
        f"{key}={value!r}" for key, value in options if contender.engine != "ullm" or usual[key] != value
    ]
    return f"{' '.join(contender.python)} {contender.engine}({', '.join(changed)})"
