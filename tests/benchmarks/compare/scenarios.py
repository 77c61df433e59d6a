"""Scenarios in which a running server is measured, and the names of their figures."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from ullm.bench.load import BenchTarget, measure
from ullm.bench.stats import BenchRecord, RunSummary
from ullm.bench.workload import Length, Workload
from ullm.errors import UllmError

PREFIX_REQUESTS = 16
PREFIX_TOKENS = 1000
SUFFIX_TOKENS = 16
PREFIX_OUTPUT = 4
PREFILL_TOKENS = 1500
PREFILL_REQUESTS = 4
LEAST_REQUESTS = 12
"""Minimum number of requests per level, so that a run of few streams is more than its beginning."""
SAMPLED_STREAMS = 16
SAMPLED_TEMPERATURE, SAMPLED_TOP_P = 0.8, 0.95
SCENARIOS = ("decode", "sampled", "prefill", "prefix")


class Metric(msgspec.Struct, frozen=True):
    """The name of a figure.

    Args:
        better: ``higher`` or ``lower``.
    """

    name: str
    unit: str
    better: str = "higher"


class RequestsFailed(UllmError):
    """A server did not answer all requests, so there is no figure."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__(f"requests failed: {errors[0]}")


START_LIVE = Metric("start to port answers", "s", "lower")
START_READY = Metric("start to ready", "s", "lower")
START_FIRST = Metric("start to first token", "s", "lower")
MEMORY = Metric("memory after the most streams", "MiB", "lower")
STOP = Metric("SIGTERM to exit, idle", "s", "lower")
PREFILL = Metric(f"prefill, {PREFILL_TOKENS}-token prompts", "prompt tok/s")
SAMPLED = Metric(
    f"decode, {SAMPLED_STREAMS} streams, temperature {SAMPLED_TEMPERATURE}, top_p {SAMPLED_TOP_P}", "tok/s"
)
PREFIX_COLD = Metric(
    f"{PREFIX_REQUESTS} new {PREFIX_TOKENS}-token prompts, time to first token", "ms", "lower"
)
PREFIX_WARM = Metric(f"the same with a shared {PREFIX_TOKENS}-token prefix", "ms", "lower")


def decode_metric(streams: int) -> Metric:
    """Return the metric for the throughput of ``streams`` streams."""
    return Metric(f"decode, {streams} stream" + ("s" if streams > 1 else ""), "tok/s")


@dataclass(frozen=True)
class ComparisonLoad:
    """The load on each server.

    Args:
        levels: concurrencies of the decode scenario.
        scenarios: some of `SCENARIOS`.
        prompt_tokens, output_tokens: tokens per request in the scenarios decode and sampled.
        seed: seed of the prompts; differs between rounds.
    """

    levels: tuple[int, ...]
    scenarios: tuple[str, ...] = SCENARIOS
    prompt_tokens: int = 32
    output_tokens: int = 128
    seed: int = 0


@dataclass
class Figures:
    """One server's figures of one round.

    Args:
        values: metric → value.
        prompt_tokens: scenario → tokens of all prompts as the server counted them, to see that all servers
            got the same.
        texts: run → digest of the generated tokens, where known.
    """

    values: dict[Metric, float]
    prompt_tokens: dict[str, int]
    texts: dict[str, str] = field(default_factory=dict)


async def run_scenarios(
    target: BenchTarget, load: ComparisonLoad, after_decode: Callable[[], Awaitable[None]]
) -> Figures:
    """Warm up with one short request, then run each scenario in turn.

    Raises:
        RequestsFailed: a request failed; further scenarios are not run.
    """
    figures = Figures({}, {})
    await warm_up(target, load.seed)
    if "decode" in load.scenarios:
        await _decode(target, load, figures)
    await after_decode()
    if "sampled" in load.scenarios:
        await _sampled(target, load, figures)
    if "prefill" in load.scenarios:
        await _prefill(target, load, figures)
    if "prefix" in load.scenarios:
        await _prefix(target, load, figures)
    return figures


async def first_token(target: BenchTarget, seed: int) -> float:
    """Request one token; return the time of its arrival on trio's clock.

    Raises:
        RequestsFailed
    """
    _, records = await _measured(target, Workload(Length(8, 8), Length(1, 1), seed=seed), 1, 1, -2)
    return records[0].arrivals[0]


async def _decode(target: BenchTarget, load: ComparisonLoad, figures: Figures) -> None:
    workload = decode_workload(load)
    for stream, level in enumerate(load.levels):
        summary, _ = await _measured(target, workload, level, max(level, LEAST_REQUESTS), stream)
        figures.values[decode_metric(level)] = summary.tokens_per_second
        figures.prompt_tokens[f"decode {level}"] = summary.prompt_tokens


async def _sampled(target: BenchTarget, load: ComparisonLoad, figures: Figures) -> None:
    words, output = (
        Length(load.prompt_tokens, load.prompt_tokens),
        Length(load.output_tokens, load.output_tokens),
    )
    workload = Workload(words, output, seed=load.seed, temperature=SAMPLED_TEMPERATURE, top_p=SAMPLED_TOP_P)
    summary, _ = await _measured(target, workload, SAMPLED_STREAMS, SAMPLED_STREAMS, 300)
    figures.values[SAMPLED] = summary.tokens_per_second
    figures.prompt_tokens["sampled"] = summary.prompt_tokens


async def _prefill(target: BenchTarget, load: ComparisonLoad, figures: Figures) -> None:
    workload = Workload(Length(PREFILL_TOKENS, PREFILL_TOKENS), Length(1, 1), seed=load.seed)
    summary, records = await _measured(target, workload, PREFILL_REQUESTS, PREFILL_REQUESTS, 100)
    seconds = max(record.arrivals[0] for record in records) - min(record.started for record in records)
    figures.values[PREFILL] = summary.prompt_tokens / seconds
    figures.prompt_tokens["prefill"] = summary.prompt_tokens


async def _prefix(target: BenchTarget, load: ComparisonLoad, figures: Figures) -> None:
    output, suffix = Length(PREFIX_OUTPUT, PREFIX_OUTPUT), Length(SUFFIX_TOKENS, SUFFIX_TOKENS)
    whole = PREFIX_TOKENS + SUFFIX_TOKENS
    cold = Workload(Length(whole, whole), output, seed=load.seed)
    shared = Workload(suffix, output, shared_prefix=PREFIX_TOKENS, seed=load.seed)
    summary, _ = await _measured(target, cold, PREFIX_REQUESTS, PREFIX_REQUESTS, 200)
    figures.values[PREFIX_COLD] = median_first(summary)
    await _measured(target, shared, 1, 1, 201)  # so that the prefix is known
    summary, _ = await _measured(target, shared, PREFIX_REQUESTS, PREFIX_REQUESTS, 202)
    figures.values[PREFIX_WARM] = median_first(summary)
    figures.prompt_tokens["prefix"] = summary.prompt_tokens


def median_first(summary: RunSummary) -> float:
    """Return the median time to the first token in milliseconds."""
    assert summary.time_to_first_token is not None, "no request failed, so each had a first token"
    return summary.time_to_first_token.p50 * 1000


async def warm_up(target: BenchTarget, seed: int) -> None:
    """Run one short request.

    Raises:
        RequestsFailed
    """
    await _measured(target, Workload(Length(8, 8), Length(8, 8), seed=seed), 1, 1, -1)


def decode_workload(load: ComparisonLoad) -> Workload:
    """Return the requests of the decode scenario."""
    words, output = load.prompt_tokens, load.output_tokens
    return Workload(Length(words, words), Length(output, output), seed=load.seed)


def require_answers(summary: RunSummary) -> None:
    """Raise `RequestsFailed` if a request failed."""
    if summary.failed:
        raise RequestsFailed(summary.errors)


async def _measured(
    target: BenchTarget, workload: Workload, streams: int, count: int, stream: int
) -> tuple[RunSummary, list[BenchRecord]]:
    summary, records = await measure(target, workload, streams, count, stream=stream)
    require_answers(summary)
    return summary, records
