"""Latency percentiles and throughput from the arrival times of tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec


@dataclass
class BenchRecord:
    """One request as its client saw it; times are seconds of one monotonic clock.

    Args:
        arrivals: times at which pieces of the text arrived; a piece may hold several tokens.
        tokens: generated tokens as the server counted them, else the number of pieces.
        error: error message of a failed request, whose times do not count.
    """

    started: float
    arrivals: list[float] = field(default_factory=list)
    finished: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def time_to_first_token(self) -> float:
        """Seconds from sending the request to the first piece of text."""
        return self.arrivals[0] - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def time_per_token(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two tokens."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1) if self.tokens > 1 else None


class Distribution(msgspec.Struct, frozen=True):
    """A distribution, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """Summarise values; return None without values."""
        if not values:
            return None
        ordered = sorted(values)
        p50, p90, p99 = (percentile(ordered, share) for share in (0.50, 0.90, 0.99))
        return cls(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


class RunSummary(msgspec.Struct, frozen=True):
    """One run at one concurrency.

    Args:
        seconds: from the first request sent to the last answer's end.
        tokens_per_second: generated tokens of all requests by ``seconds``.
        time_to_first_token, inter_token, time_per_token, end_to_end: seconds. ``inter_token`` is the
            gap between pieces of text as they arrive; ``time_per_token`` is each request's mean,
            which stays comparable where a server sends several tokens in one piece.
    """

    concurrency: int
    requests: int
    failed: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    tokens_per_second: float
    requests_per_second: float
    time_to_first_token: Distribution | None
    inter_token: Distribution | None
    time_per_token: Distribution | None
    end_to_end: Distribution | None
    finish_reasons: dict[str, int]
    errors: list[str]


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile of sorted values, which is always one of them."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarise(records: Sequence[BenchRecord], concurrency: int) -> RunSummary:
    """Condense the records of one run."""
    good = [record for record in records if record.error is None and record.arrivals]
    bad = [record for record in records if record.error is not None or not record.arrivals]
    seconds = max((r.finished for r in records), default=0.0) - min((r.started for r in records), default=0.0)
    tokens = sum(record.tokens for record in good)
    return RunSummary(
        concurrency=concurrency,
        requests=len(records),
        failed=len(bad),
        seconds=seconds,
        prompt_tokens=sum(record.prompt_tokens for record in good),
        output_tokens=tokens,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        requests_per_second=len(good) / seconds if seconds else 0.0,
        time_to_first_token=Distribution.of([record.time_to_first_token for record in good]),
        inter_token=Distribution.of([gap for record in good for gap in record.gaps]),
        time_per_token=Distribution.of([t for record in good if (t := record.time_per_token) is not None]),
        end_to_end=Distribution.of([record.finished - record.started for record in good]),
        finish_reasons=dict(Counter(record.finish_reason or "none" for record in good)),
        errors=sorted({record.error or "no token came" for record in bad}),
    )
