"""The report of simulated runs, and its plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests.benchmarks.simulation.simulated_run import SimulatedRun
from tests.benchmarks.soak.soak_report import table
from ullm.testing.processes import matplotlib_module


class SimulationReport(msgspec.Struct, frozen=True):
    """All runs, in the order in which they were made."""

    runs: list[SimulatedRun]

    def json(self) -> str:
        """Return all runs as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    def markdown(self) -> str:
        """Return a table, run by run."""
        heading = [
            "replicas, front ends, requests, routing",
            "failed",
            "lost / hung / cut",
            "resumed",
            "hit rate",
            "first token p50 / p99, ms",
            "longest gap, s",
            "CPU per request, ms",
            "choice, µs",
        ]
        return table([heading, *map(_row, self.runs)]) + "\n"


def _row(run: SimulatedRun) -> list[str]:
    return [
        f"{run.replicas}, {run.front_ends or 'none'}, {run.requests:,}, {run.routing}",
        str(run.failed),
        f"{run.lost} / {run.hung} / {run.cut}",
        str(run.resumed),
        f"{run.hit_rate:.1%}",
        f"{1e3 * run.first_token_p50:.0f} / {1e3 * run.first_token_p99:.0f}",
        f"{run.longest_gap:.1f}",
        f"{1e3 * run.cpu_per_request:.1f}",
        f"{1e6 * run.choice_seconds:.0f}",
    ]


def write_plot(runs: Sequence[SimulatedRun], file: Path) -> None:
    """Plot processor time per request against replicas and against requests."""
    matplotlib_module()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name in zip(axes, ("replicas", "requests"), strict=True):
        points = sorted((getattr(run, name), 1e3 * run.cpu_per_request) for run in runs)
        axis.plot([x for x, _ in points], [y for _, y in points], "o")
        axis.set(xscale="log", xlabel=name, ylim=(0, None))
    axes[0].set_ylabel("CPU per request, ms")
    figure.savefig(file, dpi=110)
