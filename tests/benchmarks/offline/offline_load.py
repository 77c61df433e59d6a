"""The load of the benchmarks `offline` and `defaults`: some prompts decoded at once, and prefill alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from tests.benchmarks.batch.engine_load import LOADING, EngineJob, EngineResult, RequestSource
from tests.benchmarks.compare.hardware import Limits, ModelShape, roofline
from tests.benchmarks.compare.scenarios import Metric, decode_metric
from tests.benchmarks.shared_options import parse_numbers
from ullm.cli.options import Seed, split_commas
from ullm.errors import UsageError

PREFILL = "prefill"
PREFILL_REPEATS = 3
"""Prompts whose prefill is measured, one after the other."""
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class OfflineLoad:
    """Prompts of random tokens, decoded greedily; implements `EngineLoad`.

    Args:
        levels: numbers of prompts that are decoded at once.
        prompt_tokens, output_tokens: tokens per request while decoding is measured.
        prefill_tokens: tokens of the prompts whose prefill is measured.
        neighbours: number of spinning processes beside the engines.
    """

    levels: tuple[int, ...]
    prompt_tokens: int = 32
    output_tokens: int = 128
    prefill_tokens: int = 900
    seed: int = 0
    neighbours: int = 0

    def check(self) -> None:
        """Raise `UsageError` for a load that cannot be measured."""
        for flag, value, least in (
            ("--output-tokens", self.output_tokens, 2),
            ("--prefill-tokens", self.prefill_tokens, 1),
            ("--neighbours", self.neighbours, 0),
        ):
            if value < least:
                raise UsageError(f"{flag} must be at least {least}, got {value}")

    @property
    def prefill(self) -> Metric:
        """The metric of prefill."""
        return Metric(f"prefill, {self.prefill_tokens}-token prompts", "prompt tok/s")

    def job(self, vocab_size: int, number: int = 0) -> EngineJob:
        """See `EngineLoad`. Decoding is the difference between two runs, of one token and of all."""
        source = RequestSource(f"offline {self.seed + number}", vocab_size)
        runs = {
            _run(level, tokens): [source.draw(self.prompt_tokens, tokens) for _ in range(level)]
            for level in self.levels
            for tokens in (1, self.output_tokens)
        }
        runs |= {f"{PREFILL} {n}": [source.draw(self.prefill_tokens, 1)] for n in range(PREFILL_REPEATS)}
        lengths = [self.prefill_tokens, *[self.prompt_tokens] * (max(self.levels) - 1)]
        warm_up = [source.draw(length, WARM_UP_TOKENS) for length in lengths]
        longest = max(self.prompt_tokens + self.output_tokens, self.prefill_tokens + WARM_UP_TOKENS)
        return EngineJob(runs, warm_up, 0.0, longest)

    def figures(self, job: EngineJob, result: EngineResult) -> dict[Metric, float]:
        """See `EngineLoad`."""
        seconds = result.seconds
        decoding = {
            level: seconds[_run(level, self.output_tokens)] - seconds[_run(level, 1)] for level in self.levels
        }
        prefill = sum(taken for run, taken in seconds.items() if run.startswith(PREFILL))
        return {
            **{decode_metric(n): n * (self.output_tokens - 1) / taken for n, taken in decoding.items()},
            self.prefill: PREFILL_REPEATS * self.prefill_tokens / prefill,
            LOADING: result.load_seconds,
        }

    def bounds(
        self, job: EngineJob, shape: ModelShape, limits: Limits, weight_bits: float
    ) -> dict[Metric, float]:
        """See `EngineLoad`. The head's weights are only needed for a prompt's last token."""
        context = self.prompt_tokens + self.output_tokens / 2
        layers = ModelShape(shape.layers, shape.kv_bytes)
        return {
            **{decode_metric(n): roofline(n, shape, limits, weight_bits, context) for n in self.levels},
            self.prefill: roofline(self.prefill_tokens, layers, limits, weight_bits, context=0),
        }

    def engine_options(self) -> dict[str, Any]:
        """Return nothing: ullm's own defaults are measured."""
        return {}

    def settings(self) -> dict[str, Any]:
        """See `EngineLoad`."""
        return {
            "levels": list(self.levels),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "prefill_tokens": self.prefill_tokens,
            "seed": self.seed,
            "neighbours": self.neighbours,
        }

    def describe(self) -> str:
        """See `EngineLoad`."""
        beside = f"; beside {self.neighbours} spinning processes all the time" if self.neighbours else ""
        return (
            f"Prompts of {self.prompt_tokens} random tokens, {self.output_tokens} new tokens for each, "
            f"greedy; prefill of {PREFILL_REPEATS} prompts, one after the other{beside}"
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OfflineOptions:
    """The load, as it is typed in."""

    streams: Annotated[
        list[str] | None,
        Parameter(help="Numbers of prompts that are decoded at once, separated by commas.", negative=""),
    ] = None
    output_tokens: Annotated[int, Parameter(help="Tokens to generate for each of them.")] = 128
    prefill_tokens: Annotated[int, Parameter(help="Tokens of the prompts whose prefill is measured.")] = 900
    neighbours: Annotated[int, Parameter(help="Number of spinning processes beside the engines.")] = 0
    seed: Seed = 0

    def load(self, default_levels: tuple[int, ...]) -> OfflineLoad:
        """Return the load.

        Raises:
            UsageError: it cannot be measured.
        """
        levels = default_levels
        if self.streams is not None:
            levels = tuple(parse_numbers(split_commas(self.streams), "--streams"))
        load = OfflineLoad(
            levels,
            output_tokens=self.output_tokens,
            prefill_tokens=self.prefill_tokens,
            seed=self.seed,
            neighbours=self.neighbours,
        )
        load.check()
        return load


def _run(level: int, tokens: int) -> str:
    return f"{level} × {tokens}"
