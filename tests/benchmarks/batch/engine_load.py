"""The work of an engine's turn: named runs of requests, as token ids, so that no tokenizer is measured."""

from __future__ import annotations

import random
from typing import Any, Protocol

import msgspec

from tests.benchmarks.compare.hardware import Limits, ModelShape
from tests.benchmarks.compare.scenarios import Metric

LOADING = Metric("until it can generate", "s", "lower")


class BatchRequest(msgspec.Struct, frozen=True):
    """One request; exactly ``max_tokens`` are generated."""

    prompt: list[int]
    max_tokens: int


class EngineJob(msgspec.Struct, frozen=True):
    """The requests of an engine's turn.

    Args:
        runs: name → requests that are submitted at once; one run after the other, in this order.
        warm_up: requests to run before anything is measured.
        temperature: 0 is greedy, which not every engine can do.
        longest: tokens of prompt and output that no request exceeds.
    """

    runs: dict[str, list[BatchRequest]]
    warm_up: list[BatchRequest]
    temperature: float
    longest: int


class EngineResult(msgspec.Struct, frozen=True):
    """The result that a program of `tests.benchmarks.scripts` writes.

    Args:
        seconds: duration of each run.
        texts: run → digest of the generated tokens; empty where the engine does not tell them.
    """

    version: str
    device: str
    load_seconds: float
    seconds: dict[str, float]
    texts: dict[str, str] = {}


class EngineLoad(Protocol):
    """A benchmark's load on each engine; equal seeds give equal requests."""

    def job(self, vocab_size: int, number: int) -> EngineJob:
        """Return the requests of a round."""

    def figures(self, job: EngineJob, result: EngineResult) -> dict[Metric, float]:
        """Return the figures of a finished turn."""

    def bounds(
        self, job: EngineJob, shape: ModelShape, limits: Limits, weight_bits: float
    ) -> dict[Metric, float]:
        """Return the rooflines of the metrics that have one."""

    def engine_options(self) -> dict[str, Any]:
        """Return the fields of ullm's ``EngineConfig`` that the load needs, unless options say otherwise."""

    def settings(self) -> dict[str, Any]:
        """Return the load's own parameters, for the report."""

    def describe(self) -> str:
        """Return the load in one phrase."""


class RequestSource:
    """Requests with random tokens, without the ends of the vocabulary, where special tokens are."""

    def __init__(self, seed: str, vocab_size: int) -> None:
        self.random = random.Random(seed)
        self._tokens = range(vocab_size // 8, max(vocab_size * 7 // 8, vocab_size // 8 + 1))

    def draw(self, prompt_tokens: int, output_tokens: int) -> BatchRequest:
        """Return a request of this length."""
        return BatchRequest(self.random.choices(self._tokens, k=prompt_tokens), output_tokens)
