"""The one table of metrics: name, type, labels, help, and where the value comes from."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ullm.config import MAX_SLEEP_LEVEL
from ullm.engine.state import EngineState
from ullm.engine.status import EngineStatistics, Health

STATES = (*(state.value for state in EngineState), "restarting", "sleeping")
"""The values of `Health.state`; restarting and sleeping are states of a running engine."""
SLEEP_STATES = ("awake", "falling_asleep", "asleep", "waking")
HANDOVER_OUTCOMES = ("moved", "ended", "identity", "full", "lost", "refused", "late")
"""What becomes of a choice that is to move with its KV; see `EngineStatistics.handovers_total`."""
_UP_TO_A_SECOND = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1)
SECONDS_TO_FIRST_TOKEN = (*_UP_TO_A_SECOND, 2.5, 5, 7.5, 10, 20, 40, 80)
_UP_TO_A_TENTH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1)
SECONDS_PER_TOKEN = (*_UP_TO_A_TENTH, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
SECONDS_PER_REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class MetricType(enum.Enum):
    """A Prometheus type."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


Samples = Mapping[tuple[str, ...], float]
"""Values of the labels → value."""


@dataclass(frozen=True)
class MetricSpec:
    """One metric.

    Args:
        name: without the ``_total`` that Prometheus adds to counters.
        labels: names of the labels.
        bounds: upper bounds of a histogram's buckets, ascending, without +Inf.
        health: reads the value from the engine's health, which it always has.
        statistics: reads the value from the statistics, which there are once the model is loaded; None for
            no sample. A metric with labels is read as `Samples`.
    """

    name: str
    type: MetricType
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    health: Callable[[Health], float | Samples] | None = None
    statistics: Callable[[EngineStatistics], float | Samples | None] | None = None

    @property
    def exposed_name(self) -> str:
        """The name in the text format, without a histogram's suffixes."""
        return f"{self.name}_total" if self.type is MetricType.COUNTER else self.name


def _state_set(states: tuple[str, ...], current: str) -> Samples:
    """Return a state set (OpenMetrics, 4.2.7)."""
    return {(state,): float(state == current) for state in states}


def _round_trips(health: Health) -> Samples:
    ages = {(str(replica.replica),): replica.round_trip_age for replica in health.replicas}
    return {labels: age for labels, age in ages.items() if age is not None}


def _usage(statistics: EngineStatistics) -> float:
    total = statistics.kv_blocks_total
    return statistics.kv_blocks_used / total if total else 0.0


def _counts(counts: Mapping[Any, int], keys: tuple[Any, ...] | None = None) -> Samples:
    """Return counts by label, with a zero for each of ``keys`` that has not been counted yet."""
    return {(str(key),): counts.get(key, 0) for key in (counts if keys is None else keys)}


TIME_TO_FIRST_TOKEN = MetricSpec(
    "ullm_time_to_first_token_seconds",
    MetricType.HISTOGRAM,
    "Seconds from admission to the first token of a choice.",
    bounds=SECONDS_TO_FIRST_TOKEN,
)
INTER_TOKEN_LATENCY = MetricSpec(
    "ullm_inter_token_latency_seconds",
    MetricType.HISTOGRAM,
    "Seconds between two tokens of one choice.",
    bounds=SECONDS_PER_TOKEN,
)
END_TO_END_LATENCY = MetricSpec(
    "ullm_e2e_request_latency_seconds",
    MetricType.HISTOGRAM,
    "Seconds from admission to the last token of a request.",
    bounds=SECONDS_PER_REQUEST,
)
PROMPT_TOKENS = MetricSpec(
    "ullm_request_prompt_tokens", MetricType.HISTOGRAM, "Prompt tokens per request.", bounds=TOKENS
)
GENERATION_TOKENS = MetricSpec(
    "ullm_request_generation_tokens", MetricType.HISTOGRAM, "Generated tokens per request.", bounds=TOKENS
)
HTTP_RESPONSES = MetricSpec(
    "ullm_http_responses",
    MetricType.COUNTER,
    "HTTP responses, and streams that have ended.",
    labels=("method", "route", "status"),
)

METRICS: tuple[MetricSpec, ...] = (
    MetricSpec(
        "ullm_engine_state",
        MetricType.GAUGE,
        "1 for the engine's current state, 0 for the others.",
        labels=("state",),
        health=lambda health: _state_set(STATES, health.state),
    ),
    MetricSpec(
        "ullm_sleep_state",
        MetricType.GAUGE,
        "1 for the current state of sleep, 0 for the others.",
        labels=("state",),
        health=lambda health: _state_set(SLEEP_STATES, health.sleep.state),
    ),
    MetricSpec(
        "ullm_replica_up",
        MetricType.GAUGE,
        "1 if a replica takes requests.",
        labels=("replica",),
        health=lambda health: {(str(each.replica),): float(each.up) for each in health.replicas},
    ),
    MetricSpec(
        "ullm_round_trip_age_seconds",
        MetricType.GAUGE,
        "Seconds since an answer came through the step loop of a replica.",
        labels=("replica",),
        health=_round_trips,
    ),
    MetricSpec(
        "ullm_num_requests_running",
        MetricType.GAUGE,
        "Sequences in the running batch.",
        statistics=lambda statistics: statistics.running,
    ),
    MetricSpec(
        "ullm_num_requests_waiting",
        MetricType.GAUGE,
        "Sequences waiting to run.",
        statistics=lambda statistics: statistics.waiting,
    ),
    MetricSpec(
        "ullm_admitted_tokens",
        MetricType.GAUGE,
        "Prompt and possible output tokens of the live requests.",
        statistics=lambda statistics: statistics.admitted_tokens,
    ),
    MetricSpec(
        "ullm_kv_cache_usage_ratio",
        MetricType.GAUGE,
        "Share of the KV blocks in use, from 0 to 1.",
        statistics=_usage,
    ),
    MetricSpec(
        "ullm_prefix_cache_queries",
        MetricType.COUNTER,
        "Prompt tokens looked up in the prefix cache.",
        statistics=lambda statistics: statistics.prefix_cache_query_tokens,
    ),
    MetricSpec(
        "ullm_prefix_cache_hits",
        MetricType.COUNTER,
        "Prompt tokens found in the prefix cache.",
        statistics=lambda statistics: statistics.prefix_cache_hit_tokens,
    ),
    MetricSpec(
        "ullm_prompt_tokens",
        MetricType.COUNTER,
        "Prompt tokens processed.",
        statistics=lambda statistics: statistics.prompt_tokens_total,
    ),
    MetricSpec(
        "ullm_generation_tokens",
        MetricType.COUNTER,
        "Tokens generated.",
        statistics=lambda statistics: statistics.generation_tokens_total,
    ),
    MetricSpec(
        "ullm_preemptions",
        MetricType.COUNTER,
        "Sequences preempted for lack of KV blocks.",
        statistics=lambda statistics: statistics.preemptions_total,
    ),
    MetricSpec(
        "ullm_steps",
        MetricType.COUNTER,
        "Steps scheduled for the current workers.",
        statistics=lambda statistics: statistics.steps_total,
    ),
    MetricSpec(
        "ullm_draft_tokens",
        MetricType.COUNTER,
        "Tokens proposed by speculative decoding.",
        statistics=lambda statistics: statistics.draft_tokens_total,
    ),
    MetricSpec(
        "ullm_accepted_tokens",
        MetricType.COUNTER,
        "Proposed tokens that were accepted.",
        statistics=lambda statistics: statistics.accepted_tokens_total,
    ),
    MetricSpec(
        "ullm_event_loop_hold_seconds",
        MetricType.GAUGE,
        "Longest time in which the event loop did not look for I/O, since the engine runs.",
        statistics=lambda statistics: statistics.loop_hold_seconds,
    ),
    MetricSpec(
        "ullm_event_loop_holds",
        MetricType.COUNTER,
        "Times above 0.1 s in which the event loop did not look for I/O.",
        statistics=lambda statistics: statistics.loop_holds_total,
    ),
    MetricSpec(
        "ullm_worker_restarts",
        MetricType.COUNTER,
        "Restarts of worker groups.",
        statistics=lambda statistics: statistics.worker_restarts_total,
    ),
    MetricSpec(
        "ullm_tokens_resubmitted",
        MetricType.COUNTER,
        "Tokens computed again after a worker was lost.",
        statistics=lambda statistics: statistics.tokens_resubmitted_total,
    ),
    MetricSpec(
        "ullm_requests_resumed",
        MetricType.COUNTER,
        "Times that an interrupted request was submitted again.",
        statistics=lambda statistics: statistics.requests_resumed_total,
    ),
    MetricSpec(
        "ullm_standby_taken",
        MetricType.COUNTER,
        "Standby workers that went into service.",
        statistics=lambda statistics: statistics.standby_taken_total,
    ),
    MetricSpec(
        "ullm_standby_lost",
        MetricType.COUNTER,
        "Standby workers that died.",
        statistics=lambda statistics: statistics.standby_lost_total,
    ),
    MetricSpec(
        "ullm_standby_workers",
        MetricType.GAUGE,
        "Standby worker processes: prepared, or still preparing.",
        labels=("state",),
        statistics=lambda statistics: {
            ("prepared",): statistics.standby_prepared,
            ("preparing",): statistics.standby_preparing,
        },
    ),
    MetricSpec(
        "ullm_requests",
        MetricType.COUNTER,
        "Finished choices of requests.",
        labels=("finish_reason",),
        statistics=lambda statistics: _counts(statistics.requests_total),
    ),
    MetricSpec(
        "ullm_sleeps",
        MetricType.COUNTER,
        "Times that the engine fell asleep.",
        labels=("level",),
        statistics=lambda statistics: _counts(statistics.sleeps_total, tuple(range(MAX_SLEEP_LEVEL + 1))),
    ),
    MetricSpec(
        "ullm_wakes",
        MetricType.COUNTER,
        "Times that the engine woke up.",
        statistics=lambda statistics: statistics.wakes_total,
    ),
    MetricSpec(
        "ullm_last_sleep_seconds",
        MetricType.GAUGE,
        "Seconds that the last falling asleep took.",
        statistics=lambda statistics: statistics.last_sleep_seconds,
    ),
    MetricSpec(
        "ullm_last_wake_seconds",
        MetricType.GAUGE,
        "Seconds that the last waking up took.",
        statistics=lambda statistics: statistics.last_wake_seconds,
    ),
    MetricSpec(
        "ullm_requests_routed",
        MetricType.COUNTER,
        "Choices given to a replica, by the reason for that one: session, cached prefix, load, or turn.",
        labels=("reason",),
        statistics=lambda statistics: _counts(
            statistics.requests_routed_total, ("session", "prefix", "load", "turn")
        ),
    ),
    MetricSpec(
        "ullm_kv_handovers",
        MetricType.COUNTER,
        "Choices that were to move to another replica with their KV, by what came of it: moved, or why not.",
        labels=("outcome",),
        statistics=lambda statistics: _counts(statistics.handovers_total, HANDOVER_OUTCOMES),
    ),
    MetricSpec(
        "ullm_kv_handover_blocks",
        MetricType.COUNTER,
        "KV blocks that were handed over, of all ranks together.",
        statistics=lambda statistics: statistics.handover_blocks_total,
    ),
    MetricSpec(
        "ullm_kv_handover_bytes",
        MetricType.COUNTER,
        "Bytes of KV that were handed over.",
        statistics=lambda statistics: statistics.handover_bytes_total,
    ),
    MetricSpec(
        "ullm_kv_handover_seconds",
        MetricType.COUNTER,
        "Seconds that hand-overs of KV took, while the choices were computed on.",
        statistics=lambda statistics: statistics.handover_seconds_total,
    ),
    MetricSpec(
        "ullm_bytes_given_back",
        MetricType.GAUGE,
        "Bytes of memory given back by the current sleep; 0 while awake.",
        statistics=lambda statistics: statistics.bytes_given_back,
    ),
    MetricSpec(
        "ullm_reloads",
        MetricType.COUNTER,
        "Reloads of the model.",
        labels=("outcome",),
        statistics=lambda statistics: _counts(statistics.reloads_total, ("succeeded", "failed")),
    ),
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    END_TO_END_LATENCY,
    PROMPT_TOKENS,
    GENERATION_TOKENS,
    HTTP_RESPONSES,
)


class MetricRow(NamedTuple):
    """One line of the metrics reference."""

    name: str
    type: str
    labels: tuple[str, ...]
    help: str


def reference_rows() -> Iterator[MetricRow]:
    """Yield a line per metric for the reference in the docs."""
    for spec in METRICS:
        yield MetricRow(spec.exposed_name, spec.type.value, spec.labels, spec.help)
