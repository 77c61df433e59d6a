"""Plot of the course of a long run. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.soak.judge import Reading
from tests.benchmarks.soak.soak_report import SoakReport
from ullm.testing.processes import matplotlib_module

PANELS = (
    ("per second", (("steps", "steps"), ("tokens", "tokens"))),
    ("processor ms per step", (("front end", "front"), ("worker", "worker"))),
    ("MiB", (("tree (PSS)", "pss"), ("front end (RSS)", "front_rss"), ("worker (RSS)", "worker_rss"))),
)
"""Label of each axis, with the label and the reading's field of each line."""


def draw(soak: SoakReport, file: Path) -> None:
    """Write the plot: rates, processor time and memory against time; requests are on the upper axis.

    Args:
        file: its suffix, such as .png or .svg, is the format.

    Raises:
        UsageError: matplotlib is not installed.
    """
    matplotlib_module()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    minutes = [reading.seconds / 60 for reading in soak.readings]
    for place, (label, lines) in enumerate(PANELS):
        axes = figure.add_subplot(len(PANELS), 1, place + 1, ylabel=label)
        for name, field in lines:
            axes.plot(minutes, [getattr(reading, field) for reading in soak.readings], label=name)
        if place == 0:
            axes.set_yscale("log")
            _count_requests(axes, soak.readings)
        else:
            axes.set_ylim(bottom=0)
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend(loc="lower right")
    axes.set_xlabel("minutes")
    figure.savefig(file, dpi=150)


def _count_requests(axes: object, readings: list[Reading]) -> None:
    """Draw the number of requests on an upper axis."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    ticks = readings[:: max(1, len(readings) // 6)]
    upper = axes.secondary_xaxis("top")
    upper.set_xticks([tick.seconds / 60 for tick in ticks], [str(tick.requests) for tick in ticks])
    upper.set_xlabel("requests")
