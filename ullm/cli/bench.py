"""``ullm bench``: latency and throughput of a running server, or of an engine in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ullm.bench.load import Target, measure
from ullm.bench.report import Report
from ullm.bench.stats import Summary
from ullm.bench.workload import Length, Workload
from ullm.cli.interrupts import run_to_end
from ullm.cli.terminal import stderr
from ullm.client.http import Endpoint
from ullm.config import EngineConfig
from ullm.errors import UsageError

WARM_UP = Length(8, 8)
MAX_TEMPERATURE = 100
"""What servers take; OpenAI's own takes 2."""


def parse_concurrency(text: str) -> list[int]:
    """``1,4,16`` as numbers.

    Raises:
        UsageError: not a list of whole numbers above 0.
    """
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise UsageError(f"--concurrency {text}: expected numbers above 0, separated by commas, as in 1,4,16")
    return levels


def make_workload(
    prompt_words: str,
    output_tokens: str,
    shared_prefix: int,
    seed: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Workload:
    """From what the command line says.

    Raises:
        UsageError: a length that is none, or a number out of its range; names the flag.
    """
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise UsageError(f"--temperature must be between 0 and {MAX_TEMPERATURE}, got {temperature:g}")
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p must be above 0 and at most 1, got {top_p}")
    if shared_prefix < 0:
        raise UsageError(f"--shared-prefix must be at least 0, got {shared_prefix}")
    prompt = Length.parse(prompt_words, "--prompt-words")
    output = Length.parse(output_tokens, "--output-tokens")
    return Workload(prompt, output, shared_prefix, seed, temperature, top_p)


async def run_levels(
    target: Target,
    workload: Workload,
    levels: Sequence[int],
    requests_per_level: int | None,
    console: Console,
) -> list[Summary]:
    """Measure each concurrency in turn, after one short request to warm up.

    Args:
        requests_per_level: None: as many as are in flight at once, but at least 4.
    """
    await measure(target, Workload(output_tokens=WARM_UP, seed=workload.seed), 1, 1, stream=-1)
    summaries = []
    for index, level in enumerate(levels):
        count = requests_per_level or max(level, 4)
        summary, _ = await measure(target, workload, level, count, stream=index)
        console.print(f"{level} streams: {summary.tokens_per_second:.1f} tok/s", style="dim")
        summaries.append(summary)
    return summaries


def bench_server(
    endpoint: Endpoint,
    model: str | None,
    workload: Workload,
    levels: Sequence[int],
    requests_per_level: int | None,
    *,
    chat: bool,
) -> Report:
    """Measure a running OpenAI-compatible server.

    Raises:
        ServerUnreachable, ServerRefused: it cannot even be asked for its models.
    """
    from ullm.client.completions import ServerTarget, first_model

    async def main() -> Report:
        name = model or await first_model(endpoint)
        target = ServerTarget(endpoint, name, chat=chat)
        try:
            runs = await run_levels(target, workload, levels, requests_per_level, stderr())
        finally:
            await target.aclose()
        return Report.of(target.name, name, workload, runs)

    return run_to_end(main)


def bench_engine(
    config: EngineConfig, workload: Workload, levels: Sequence[int], requests_per_level: int | None
) -> Report:
    """Measure an engine opened in this process.

    Raises:
        ModelError, ConfigError: it cannot start.
    """
    from ullm.bench.engine import EngineTarget
    from ullm.engine import open_engine

    async def main() -> Report:
        async with open_engine(config) as engine:
            target = EngineTarget(engine)
            runs = await run_levels(target, workload, levels, requests_per_level, stderr())
            return Report.of(target.name, engine.model_name, workload, runs)

    return run_to_end(main)


def publish(report: Report, output: Path | None, *, as_json: bool) -> int:
    """Print the report, save it if asked to; exit status 1 if a request failed."""
    if output is not None:
        output.write_text(
            report.markdown() if output.suffix == ".md" else report.json() + "\n", encoding="utf-8"
        )
    if as_json:
        sys.stdout.write(report.json() + "\n")
    else:
        report.show(Console(highlight=False))
    return 1 if any(run.failed for run in report.runs) else 0
