"""``ullm bench``: latency and throughput of a running server, or of an engine in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ullm.bench.bench_report import BenchReport
from ullm.bench.load import BenchTarget, measure
from ullm.bench.server_target import ServerTarget
from ullm.bench.stats import RunSummary
from ullm.bench.workload import Length, Workload
from ullm.cli.interrupts import run_to_end
from ullm.cli.options import LoadOptions, split_commas
from ullm.cli.terminal import stderr
from ullm.client.completions import first_model
from ullm.client.http import Endpoint
from ullm.config import EngineConfig
from ullm.errors import UsageError

WARM_UP = Length(8, 8)
MAX_TEMPERATURE = 100
"""The highest that common servers accept; OpenAI's own accepts 2."""
DEFAULT_LEVELS = (1, 4, 16, 32)


@dataclass(frozen=True)
class BenchPlan:
    """What is measured.

    Args:
        levels: numbers of requests in flight; each is one run.
        requests: per run; None: as many as are in flight, but at least 4.
    """

    workload: Workload
    levels: Sequence[int]
    requests: int | None = None


def parse_concurrency(values: Sequence[str]) -> list[int]:
    """Return the numbers of ``1,4,16``.

    Raises:
        UsageError: not a list of whole numbers above 0.
    """
    try:
        levels = [int(value) for value in values]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise UsageError(
            f"--concurrency {','.join(values)}: expected numbers above 0, separated by commas, as in 1,4,16"
        )
    return levels


def parse_load(options: LoadOptions) -> BenchPlan:
    """Check the options and return what they mean.

    Raises:
        UsageError: a value that is malformed or out of its range; names the option.
    """
    if not 0 <= options.temperature <= MAX_TEMPERATURE:
        raise UsageError(f"--temperature must be from 0 to {MAX_TEMPERATURE}, got {options.temperature:g}")
    if not 0 < options.top_p <= 1:
        raise UsageError(f"--top-p must be above 0 and at most 1, got {options.top_p}")
    if options.shared_prefix < 0:
        raise UsageError(f"--shared-prefix must be at least 0, got {options.shared_prefix}")
    if options.requests is not None and options.requests < 1:
        raise UsageError(f"--requests must be at least 1, got {options.requests}")
    workload = Workload(
        Length.parse(options.prompt_words, "--prompt-words"),
        Length.parse(options.output_tokens, "--output-tokens"),
        options.shared_prefix,
        options.seed,
        options.temperature,
        options.top_p,
    )
    levels = (
        DEFAULT_LEVELS
        if options.concurrency is None
        else parse_concurrency(split_commas(options.concurrency))
    )
    return BenchPlan(workload, levels, options.requests)


async def run_levels(target: BenchTarget, plan: BenchPlan, console: Console) -> list[RunSummary]:
    """Measure each concurrency in turn, after one short request to warm up."""
    await measure(target, Workload(output_tokens=WARM_UP, seed=plan.workload.seed), 1, 1, stream=-1)
    summaries = []
    for index, level in enumerate(plan.levels):
        count = plan.requests or max(level, 4)
        summary, _ = await measure(target, plan.workload, level, count, stream=index)
        console.print(f"{level} streams: {summary.tokens_per_second:.1f} tok/s", style="dim")
        summaries.append(summary)
    return summaries


def bench_server(endpoint: Endpoint, model: str | None, plan: BenchPlan, *, chat: bool) -> BenchReport:
    """Measure a running OpenAI-compatible server.

    Raises:
        ServerUnreachable, ServerRefused: it does not even list its models.
    """

    async def main() -> BenchReport:
        name = model or await first_model(endpoint)
        target = ServerTarget(endpoint, name, chat=chat)
        try:
            runs = await run_levels(target, plan, stderr())
        finally:
            await target.aclose()
        return BenchReport.of(target.name, name, plan.workload, runs)

    return run_to_end(main)


def bench_engine(config: EngineConfig, plan: BenchPlan) -> BenchReport:
    """Measure an engine that is opened in this process.

    Raises:
        ModelError, ConfigError: it cannot start.
    """
    from ullm.bench.engine_target import EngineTarget
    from ullm.engine import open_engine

    async def main() -> BenchReport:
        async with open_engine(config) as engine:
            target = EngineTarget(engine)
            runs = await run_levels(target, plan, stderr())
            return BenchReport.of(target.name, engine.model_name, plan.workload, runs)

    return run_to_end(main)


def check_output(output: Path | None) -> None:
    """Check that a report can be written, before anything is measured; an existing one stays as it is.

    Raises:
        OSError: it cannot.
    """
    if output is None:
        return
    there = output.exists()
    with output.open("ab"):
        pass
    if not there:
        output.unlink()


def publish(report: BenchReport, output: Path | None, *, as_json: bool) -> int:
    """Print the report and save it to ``output``; return 1 if a request failed, else 0."""
    if output is not None:
        output.write_text(
            report.markdown() if output.suffix == ".md" else report.json() + "\n", encoding="utf-8"
        )
    if as_json:
        sys.stdout.write(report.json() + "\n")
    else:
        report.show(Console(highlight=False))
    return 1 if any(run.failed for run in report.runs) else 0
