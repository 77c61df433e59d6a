"""The load of the benchmark `batch`: many requests at once, one alone, and their minimum cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.batch.engine_load import (
    LOADING,
    BatchRequest,
    EngineJob,
    EngineResult,
    RequestSource,
)
from tests.benchmarks.compare.hardware import Limits, ModelShape, roofline
from tests.benchmarks.compare.scenarios import Metric
from ullm.bench.workload import Length
from ullm.errors import UsageError

WARM_UP_REQUESTS = 32
WARM_UP_TOKENS = 8
SINGLE_PROMPT = 32
BATCHED_TOKENS = 8192
"""Tokens per step of ullm unless its options say otherwise; vLLM's default, too."""
ALL, FIRST, WHOLE = "all at once", "one alone, one token", "one alone, all tokens"
"""The runs. The last two differ in decoding alone."""
THROUGHPUT = Metric("all requests at once, output", "tok/s")
SECONDS = Metric("all requests at once", "s", "lower")
SINGLE = Metric("one request alone, decoding", "tok/s")


@dataclass(frozen=True)
class BatchLoad:
    """The load: lengths and tokens are drawn uniformly; implements `EngineLoad`.

    Args:
        prompt_tokens, output_tokens: tokens per request.
        single_tokens: tokens that one request alone generates.
        temperature: 0 is greedy, which not every engine can do.
    """

    requests: int = 256
    prompt_tokens: Length = Length(100, 1024)
    output_tokens: Length = Length(100, 1024)
    single_tokens: int = 256
    temperature: float = 0.6
    seed: int = 0

    def check(self) -> None:
        """Raise `UsageError` for a load that cannot be measured."""
        for flag, value, least in (
            ("--requests", self.requests, 1),
            ("--single-tokens", self.single_tokens, 2),
        ):
            if value < least:
                raise UsageError(f"{flag} must be at least {least}, got {value}")
        if not 0 <= self.temperature <= 10:
            raise UsageError(f"--temperature must be from 0 to 10, got {self.temperature:g}")

    @property
    def longest(self) -> int:
        """Tokens of prompt and output that no request exceeds."""
        ordinary = self.prompt_tokens.high + self.output_tokens.high
        return max(ordinary, SINGLE_PROMPT + max(self.single_tokens, WARM_UP_TOKENS))

    def job(self, vocab_size: int, number: int = 0) -> EngineJob:
        """See `EngineLoad`."""
        source = RequestSource(f"batch {self.seed + number}", vocab_size)
        lengths, random = (self.prompt_tokens, self.output_tokens), source.random
        runs = {
            ALL: [source.draw(*(length.draw(random) for length in lengths)) for _ in range(self.requests)],
            FIRST: [source.draw(SINGLE_PROMPT, 1)],
            WHOLE: [source.draw(SINGLE_PROMPT, self.single_tokens)],
        }
        count = min(self.requests, WARM_UP_REQUESTS)
        warm_up = [source.draw(SINGLE_PROMPT, WARM_UP_TOKENS) for _ in range(count)]
        return EngineJob(runs, warm_up, self.temperature, self.longest)

    def figures(self, job: EngineJob, result: EngineResult) -> dict[Metric, float]:
        """See `EngineLoad`."""
        seconds = result.seconds
        return {
            THROUGHPUT: output_tokens(job.runs[ALL]) / seconds[ALL],
            SECONDS: seconds[ALL],
            SINGLE: (self.single_tokens - 1) / (seconds[WHOLE] - seconds[FIRST]),
            LOADING: result.load_seconds,
        }

    def bounds(
        self, job: EngineJob, shape: ModelShape, limits: Limits, weight_bits: float
    ) -> dict[Metric, float]:
        """See `EngineLoad`."""
        requests, context = job.runs[ALL], SINGLE_PROMPT + self.single_tokens / 2
        return {
            THROUGHPUT: output_tokens(requests) / least_seconds(requests, shape, limits, weight_bits),
            SINGLE: roofline(1, shape, limits, weight_bits, context),
        }

    def engine_options(self) -> dict[str, Any]:
        """Return room for all requests at once; see `EngineLoad`."""
        return {
            "max_bs": self.requests,
            "max_num_batched_tokens": max(BATCHED_TOKENS, self.requests),
            "max_queue": max(self.requests, 1024),
            "context_len": self.longest,
            "standby_workers": 0,
        }

    def settings(self) -> dict[str, Any]:
        """See `EngineLoad`."""
        return {
            "requests": self.requests,
            "prompt_tokens": str(self.prompt_tokens),
            "output_tokens": str(self.output_tokens),
            "single_tokens": self.single_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    def describe(self) -> str:
        """See `EngineLoad`."""
        return (
            f"{self.requests} requests at once, prompts of {self.prompt_tokens} random tokens, "
            f"outputs of {self.output_tokens}, temperature {self.temperature:g}"
        )


def output_tokens(requests: Sequence[BatchRequest]) -> int:
    """Return the number of tokens that requests together generate."""
    return sum(request.max_tokens for request in requests)


def least_seconds(
    requests: Sequence[BatchRequest], shape: ModelShape, limits: Limits, weight_bits: float
) -> float:
    """Return the roofline in seconds: no engine on this device finishes all requests earlier.

    With all of them in one batch, each step reads the weights once, so they are read as often as the
    longest output has tokens; the token after ``n`` others of its sequence reads the KV of ``n``. Each token
    of prompts and outputs costs two operations per weight.
    """
    steps = max(request.max_tokens for request in requests)
    weights = shape.parameters * weight_bits / 8 * steps
    read = sum(len(request.prompt) + past for request in requests for past in range(1, request.max_tokens))
    tokens = sum(len(request.prompt) for request in requests) + output_tokens(requests)
    operations = 2 * shape.parameters * tokens / limits.operations(weight_bits)
    return max((weights + read * shape.kv_bytes) / limits.bandwidth, operations)
