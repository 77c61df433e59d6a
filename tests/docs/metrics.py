"""Every series of ``/metrics``, for docs/reference/metrics.md."""

from __future__ import annotations

import typing
from typing import Any

from prometheus_client.core import Metric

from tests.docs.docstrings import markdown, table
from ullm.engine.status import EngineStatistics, Health, ReplicaHealth
from ullm.server.metrics import Metrics

SUFFIXES = {"counter": "_total"}
"""Type of a series → what its name ends with in the text format."""


class SampleEngine:
    """An engine that has done a little of everything, so that every series has a sample."""

    info = object()
    """Something loaded; the series do not look into it."""

    def statistics(self) -> EngineStatistics:
        """Return counts that are all above zero."""
        hints = typing.get_type_hints(EngineStatistics)
        return EngineStatistics(**{name: _sample(name, hint) for name, hint in hints.items()})

    def health(self) -> Health:
        """Return a running engine with one replica."""
        replica = ReplicaHealth(0, True, 1, [1], round_trip_age=0.1, round_trip_seconds=0.1)
        return Health("running", True, True, "", [replica])


def _sample(name: str, hint: Any) -> Any:
    if typing.get_origin(hint) is dict:
        key, _ = typing.get_args(hint)
        return {1 if key is int else "succeeded" if name.startswith("reloads") else "stop": 1}
    return 1


def families() -> list[Metric]:
    """Return every series as Prometheus' client has it, by name."""
    metrics = Metrics(SampleEngine())  # type: ignore[arg-type]  # it asks for statistics and health only
    metrics.count_response("POST", "/v1/completions", 200)
    return sorted(metrics.collect(), key=lambda family: family.name)


def series_name(family: Metric) -> str:
    """Return the name by which queries know a series; that of a histogram without its suffixes."""
    return str(family.name) + SUFFIXES.get(family.type, "")


def metric_table() -> str:
    """Return a row per series: name, type, labels, meaning."""
    return table(
        ["series", "type", "labels", "meaning"],
        [
            [f"`{series_name(family)}`", family.type, _labels(family), markdown(family.documentation)]
            for family in families()
        ],
    )


def _labels(family: Metric) -> str:
    names = {name: None for sample in family.samples for name in sample.labels if name != "le"}
    return ", ".join(f"`{name}`" for name in names)
