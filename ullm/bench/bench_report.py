"""Results as a table, as JSON and as Markdown."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import ullm
from ullm.bench.stats import Distribution, RunSummary
from ullm.bench.workload import Workload

COLUMNS = (
    "streams",
    "tok/s",
    "req/s",
    "TTFT p50",
    "TTFT p99",
    "gap p50",
    "gap p90",
    "gap p99",
    "e2e p50",
    "e2e p99",
    "failed",
)


CAPTION = "TTFT: time to first token; gap: between pieces of text; e2e: whole request; all in ms"


class BenchReport(msgspec.Struct, frozen=True):
    """A finished benchmark.

    Args:
        target: name of what was measured.
        when: date and time, ISO 8601, UTC.
        machine: description of the machine; see `machine`.
        workload: description of the requests.
    """

    target: str
    model: str
    when: str
    machine: dict[str, Any]
    workload: dict[str, Any]
    runs: list[RunSummary]

    @classmethod
    def of(cls, target: str, model: str, workload: Workload, runs: Sequence[RunSummary]) -> BenchReport:
        """Build a report of the runs, with date, machine and workload."""
        requests = {
            "prompt_words": str(workload.prompt_words),
            "output_tokens": str(workload.output_tokens),
            "shared_prefix": workload.shared_prefix,
            "seed": workload.seed,
            "temperature": workload.temperature,
            "top_p": workload.top_p,
        }
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(target, model, when, machine(), requests, list(runs))

    def json(self) -> str:
        """Return indented JSON, times in seconds."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def markdown(self) -> str:
        """Return a Markdown table, times in milliseconds."""
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " ---: |" * len(COLUMNS)]
        return "\n".join(lines + ["| " + " | ".join(_cells(run)) + " |" for run in self.runs]) + "\n"

    def show(self, console: Console) -> None:
        """Print a table, times in milliseconds."""
        title = f"{self.target} · {self.model} · prompts of {self.workload['prompt_words']} words"
        table = Table(title=title, caption=CAPTION, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in COLUMNS:
            table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
        for run in self.runs:
            table.add_row(*_cells(run))
        console.print(table)
        for message in sorted({error for run in self.runs for error in run.errors}):
            console.print(f"failed: {message}", style="red", markup=False)


def machine() -> dict[str, Any]:
    """Describe the machine that the clients ran on."""
    import os

    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "ullm": ullm.__version__,
    }


def _cells(run: RunSummary) -> list[str]:
    first, gap, whole = run.time_to_first_token, run.inter_token, run.end_to_end
    return [
        str(run.concurrency),
        f"{run.tokens_per_second:.1f}",
        f"{run.requests_per_second:.2f}",
        *(_milliseconds(first, name) for name in ("p50", "p99")),
        *(_milliseconds(gap, name) for name in ("p50", "p90", "p99")),
        *(_milliseconds(whole, name) for name in ("p50", "p99")),
        str(run.failed),
    ]


def _milliseconds(spread: Distribution | None, name: str) -> str:
    if spread is None:
        return "–"
    value = getattr(spread, name) * 1000
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
