"""Plot of throughput against concurrency, with the roofline. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.compare.comparison import Comparison
from tests.benchmarks.compare.hardware import roofline
from tests.benchmarks.compare.scenarios import decode_metric
from ullm.testing.processes import matplotlib_module

POINTS_PER_OCTAVE = 8


def draw(comparison: Comparison, file: Path, context: float) -> None:
    """Write the plot; the file's suffix, such as .png or .svg, is its format.

    Args:
        context: average number of tokens per stream whose KV is read.

    Raises:
        UsageError: matplotlib is not installed.
    """
    matplotlib_module()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(yscale="log", xlabel="streams", ylabel="tokens per second")
    axes.set_xscale("log", base=2)
    levels = sorted({streams for each in comparison.competitors for streams in each.bounds})
    for bits in sorted({each.weight_bits for each in comparison.competitors}, reverse=True):
        steps = _steps(levels)
        bounds = [roofline(n, comparison.shape, comparison.limits, bits, context) for n in steps]
        axes.plot(steps, bounds, linestyle="--", linewidth=1, color="0.6")
        axes.annotate(f"bound, {bits:g} bits", (steps[0], bounds[0]), fontsize=8, color="0.4", va="bottom")
    for competitor in comparison.competitors:
        medians = {n: _median(comparison, competitor.name, n) for n in levels}
        shown = {n: value for n, value in medians.items() if value is not None}
        axes.plot(list(shown), list(shown.values()), marker="o", label=competitor.name)
    axes.set_xticks(levels, [str(level) for level in levels], minor=False)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(file, dpi=150)


def _median(comparison: Comparison, name: str, streams: int) -> float | None:
    line = next((each for each in comparison.lines if each.metric == decode_metric(streams)), None)
    entry = line.entries.get(name) if line else None
    return entry.median if entry else None


def _steps(levels: list[int]) -> list[float]:
    steps, last = [float(levels[0])], float(levels[-1])
    while steps[-1] < last:
        steps.append(min(last, steps[-1] * 2 ** (1 / POINTS_PER_OCTAVE)))
    return steps
