"""Every series of ``/metrics``, for docs/reference/metrics.md."""

from __future__ import annotations

from tests.docs.docstrings import markdown, table
from ullm.server.metrics_table import reference_rows


def metric_table() -> str:
    """Return a row per series, by name: type, labels, meaning."""
    heads = ["series", "type", "labels", "meaning"]
    rows = sorted(reference_rows(), key=lambda row: row.name)
    return table(
        heads,
        [
            [f"`{row.name}`", row.type, ", ".join(f"`{label}`" for label in row.labels), markdown(row.help)]
            for row in rows
        ],
    )


def series_names() -> set[str]:
    """Return the names by which queries know the series; those of histograms without a suffix."""
    return {row.name for row in reference_rows()}
