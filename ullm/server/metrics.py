"""Prometheus metrics: the engine's statistics, read when scraped, and latencies that the server sees."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from ullm.server import metrics_table as table
from ullm.server.api.types import EngineInterface
from ullm.server.metrics_table import METRICS, MetricSpec, MetricType, Samples


class Histogram:
    """Counts per bucket. Without a lock or a label lookup, because it is fed once per chunk of a stream."""

    def __init__(self, spec: MetricSpec) -> None:
        self._spec = spec
        self._counts = [0] * (len(spec.bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value`` the given number of times."""
        self._counts[bisect_left(self._spec.bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Metric:
        """Return the buckets as Prometheus wants them: cumulative."""
        buckets, total = [], 0
        bounds = (*map(str, map(float, self._spec.bounds)), "+Inf")
        for bound, count in zip(bounds, self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return HistogramMetricFamily(self._spec.name, self._spec.help, buckets=buckets, sum_value=self._sum)


class Metrics(Collector):
    """Everything that ``/metrics`` shows of one app."""

    def __init__(self, engine: EngineInterface) -> None:
        self._engine = engine
        self._responses: Counter[tuple[str, ...]] = Counter()
        self.first_token = Histogram(table.TIME_TO_FIRST_TOKEN)
        self.inter_token = Histogram(table.INTER_TOKEN_LATENCY)
        self.end_to_end = Histogram(table.END_TO_END_LATENCY)
        self.prompt_tokens = Histogram(table.PROMPT_TOKENS)
        self.generation_tokens = Histogram(table.GENERATION_TOKENS)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def count_response(self, method: str, route: str, status: int) -> None:
        """Count an HTTP response that was made, or a stream that has ended."""
        self._responses[method, route, str(status)] += 1

    def render(self) -> tuple[bytes, str]:
        """Return the text format and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics. Called by the registry when scraped."""
        health = self._engine.health()
        statistics = None if self._engine.info is None else self._engine.statistics()
        for spec in METRICS:
            if spec.health is not None:
                yield _family(spec, spec.health(health))
            elif spec.statistics is not None and statistics is not None:
                value = spec.statistics(statistics)
                if value is not None:
                    yield _family(spec, value)
        for histogram in self._histograms():
            yield histogram.collect()
        yield _family(table.HTTP_RESPONSES, self._responses)

    def _histograms(self) -> tuple[Histogram, ...]:
        return (
            self.first_token,
            self.inter_token,
            self.end_to_end,
            self.prompt_tokens,
            self.generation_tokens,
        )


def _family(spec: MetricSpec, value: float | Samples) -> Metric:
    kind = CounterMetricFamily if spec.type is MetricType.COUNTER else GaugeMetricFamily
    if isinstance(value, int | float):
        return kind(spec.name, spec.help, value)
    family = kind(spec.name, spec.help, labels=spec.labels)
    for labels, sample in value.items():
        family.add_metric(labels, sample)
    return family


class RequestTimer:
    """The latencies of one HTTP request, from its admission."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.perf_counter) -> None:
        self._metrics = metrics
        self._clock = clock
        self._began = clock()
        self._last: dict[tuple[int, int], float] = {}

    def note(self, choice: tuple[int, int], tokens: int) -> None:
        """Note that ``tokens`` more have come for a choice."""
        if not tokens:
            return
        now = self._clock()
        last = self._last.get(choice)
        if last is None:
            self._metrics.first_token.observe(now - self._began)
        else:
            self._metrics.inter_token.observe((now - last) / tokens, tokens)
        self._last[choice] = now

    def end(self, prompt_tokens: int, generation_tokens: int) -> None:
        """Note that the request has its last token."""
        self._metrics.end_to_end.observe(self._clock() - self._began)
        self._metrics.prompt_tokens.observe(prompt_tokens)
        self._metrics.generation_tokens.observe(generation_tokens)
