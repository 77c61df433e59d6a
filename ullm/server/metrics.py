"""Prometheus metrics: the engine's statistics, read when scraped, and latencies that the server sees."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from ullm.config import MAX_SLEEP_LEVEL
from ullm.engine.state import EngineState
from ullm.engine.status import EngineStatistics, Health
from ullm.server.api.types import Engine

STATES = (*(state.value for state in EngineState), "restarting", "sleeping")
"""What `Health.state` can be: a running engine is told apart by what runs."""
SLEEP_STATES = ("awake", "falling_asleep", "asleep", "waking")
SECONDS_TO_FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
SECONDS_PER_TOKEN = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
)
SECONDS_PER_REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Histogram:
    """Counts per bucket. Without a lock or a label lookup, because it is fed once per chunk of a stream.

    Args:
        bounds: upper bounds of the buckets, ascending, the last (+Inf) left out.
    """

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self._name, self._help, self._bounds = name, help, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value`` as often as given."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Metric:
        """As Prometheus wants it: cumulative."""
        buckets, total = [], 0
        for bound, count in zip((*map(str, map(float, self._bounds)), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return HistogramMetricFamily(self._name, self._help, buckets=buckets, sum_value=self._sum)


class Metrics(Collector):
    """Everything that ``/metrics`` shows of one app."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._responses: Counter[tuple[str, str, int]] = Counter()
        self.first_token = Histogram(
            "ullm_time_to_first_token_seconds", "From admission to the first token.", SECONDS_TO_FIRST_TOKEN
        )
        self.inter_token = Histogram(
            "ullm_inter_token_latency_seconds", "Between two tokens of one choice.", SECONDS_PER_TOKEN
        )
        self.end_to_end = Histogram(
            "ullm_e2e_request_latency_seconds", "From admission to the last token.", SECONDS_PER_REQUEST
        )
        self.prompt_tokens = Histogram("ullm_request_prompt_tokens", "Prompt tokens per request.", TOKENS)
        self.generation_tokens = Histogram(
            "ullm_request_generation_tokens", "Generated tokens per request.", TOKENS
        )
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def count_response(self, method: str, route: str, status: int) -> None:
        """An HTTP response has been sent, or its stream has ended."""
        self._responses[method, route, status] += 1

    def render(self) -> tuple[bytes, str]:
        """The text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """Called by the registry when scraped."""
        yield from self._engine_metrics()
        yield from (
            histogram.collect()
            for histogram in (
                self.first_token,
                self.inter_token,
                self.end_to_end,
                self.prompt_tokens,
                self.generation_tokens,
            )
        )
        responses = CounterMetricFamily(
            "ullm_http_responses", "HTTP responses.", labels=("method", "route", "status")
        )
        for (method, route, status), count in self._responses.items():
            responses.add_metric((method, route, str(status)), count)
        yield responses

    def _engine_metrics(self) -> Iterator[Metric]:
        yield from _health_metrics(self._engine.health())
        if self._engine.info is None:
            return
        found = self._engine.statistics()
        yield from _sleep_metrics(found)
        usage = found.kv_blocks_used / found.kv_blocks_total if found.kv_blocks_total else 0.0
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge("ullm_num_requests_running", "Sequences in the running batch.", found.running)
        yield gauge("ullm_num_requests_waiting", "Sequences waiting to run.", found.waiting)
        yield gauge("ullm_admitted_tokens", "Tokens that live requests may need.", found.admitted_tokens)
        yield gauge("ullm_kv_cache_usage_ratio", "Share of the KV blocks in use.", usage)
        for name, help, value in (
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                found.prefix_cache_query_tokens,
            ),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", found.prefix_cache_hit_tokens),
            ("prompt_tokens", "Prompt tokens processed.", found.prompt_tokens_total),
            ("generation_tokens", "Tokens generated.", found.generation_tokens_total),
            ("preemptions", "Sequences preempted for lack of KV blocks.", found.preemptions_total),
            ("steps", "Steps planned for the present workers.", found.steps_total),
            ("draft_tokens", "Tokens guessed by speculative decoding.", found.draft_tokens_total),
            ("accepted_tokens", "Guessed tokens that were right.", found.accepted_tokens_total),
            ("worker_restarts", "Worker groups restarted.", found.worker_restarts_total),
            (
                "tokens_resubmitted",
                "Tokens sent again after a worker was lost.",
                found.tokens_resubmitted_total,
            ),
            ("requests_resumed", "Submissions of interrupted requests.", found.requests_resumed_total),
            ("standby_taken", "Standby workers that went into service.", found.standby_taken_total),
            ("standby_lost", "Standby workers that died.", found.standby_lost_total),
        ):
            yield counter(f"ullm_{name}", help, value)
        spares = gauge("ullm_standby_workers", "Spare worker processes.", labels=("state",))
        spares.add_metric(("prepared",), found.standby_prepared)
        spares.add_metric(("preparing",), found.standby_preparing)
        yield spares
        finished = counter("ullm_requests", "Finished requests.", labels=("finish_reason",))
        for reason, count in found.requests_total.items():
            finished.add_metric((reason,), count)
        yield finished


def _health_metrics(health: Health) -> Iterator[Metric]:
    """State sets (OpenMetrics, 4.2.7), and the age of the last round trip through each replica."""
    yield _state_set("ullm_engine_state", "1 for the engine's present state.", STATES, health.state)
    yield _state_set(
        "ullm_sleep_state", "1 for the present state of sleep.", SLEEP_STATES, health.sleep.state
    )
    age = GaugeMetricFamily(
        "ullm_round_trip_age_seconds", "Since an answer came through the step loop.", labels=("replica",)
    )
    up = GaugeMetricFamily("ullm_replica_up", "Whether a replica takes requests.", labels=("replica",))
    for replica in health.replicas:
        up.add_metric((str(replica.replica),), float(replica.up))
        if replica.round_trip_age is not None:
            age.add_metric((str(replica.replica),), replica.round_trip_age)
    yield up
    yield age


def _state_set(name: str, help: str, states: Sequence[str], present: str) -> Metric:
    found = GaugeMetricFamily(name, help, labels=("state",))
    for state in states:
        found.add_metric((state,), float(state == present))
    return found


def _sleep_metrics(found: EngineStatistics) -> Iterator[Metric]:
    sleeps = CounterMetricFamily("ullm_sleeps", "Times that the engine fell asleep.", labels=("level",))
    for level in range(MAX_SLEEP_LEVEL + 1):
        sleeps.add_metric((str(level),), found.sleeps_total.get(level, 0))
    yield sleeps
    yield CounterMetricFamily("ullm_wakes", "Times that the engine woke up.", found.wakes_total)
    for name, seconds in (("sleep", found.last_sleep_seconds), ("wake", found.last_wake_seconds)):
        if seconds is not None:
            yield GaugeMetricFamily(f"ullm_last_{name}_seconds", f"Duration of the last {name}.", seconds)
    yield GaugeMetricFamily("ullm_bytes_given_back", "By the present sleep.", found.bytes_given_back)
    reloads = CounterMetricFamily("ullm_reloads", "Reloads of the model.", labels=("outcome",))
    for outcome in ("succeeded", "failed"):
        reloads.add_metric((outcome,), found.reloads_total.get(outcome, 0))
    yield reloads


class RequestTimer:
    """The latencies of one HTTP request, from its admission."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.perf_counter) -> None:
        self._metrics = metrics
        self._clock = clock
        self._began = clock()
        self._last: dict[tuple[int, int], float] = {}

    def note(self, choice: tuple[int, int], tokens: int) -> None:
        """``tokens`` more have come for a choice."""
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
        """The request has its last token."""
        self._metrics.end_to_end.observe(self._clock() - self._began)
        self._metrics.prompt_tokens.observe(prompt_tokens)
        self._metrics.generation_tokens.observe(generation_tokens)
