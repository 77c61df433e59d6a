"""The requests to every engine, as token ids, so that no tokenizer is measured; and their minimum cost."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tests.benchmarks.compare.hardware import Limits, ModelShape
from ullm.bench.workload import Length
from ullm.errors import UsageError

WARM_UP_REQUESTS = 32
WARM_UP_TOKENS = 8
SINGLE_PROMPT = 32


class BatchRequest(msgspec.Struct, frozen=True):
    """One request; exactly ``max_tokens`` are generated."""

    prompt: list[int]
    max_tokens: int


class BatchJob(msgspec.Struct, frozen=True):
    """All requests of an engine's turn.

    Args:
        requests: submitted at once.
        single: run alone, one after the other: the first for one token, the second for many, so that the
            difference is decoding alone.
        warm_up: run before anything is measured.
        longest: tokens of prompt and output that no request exceeds.
    """

    requests: list[BatchRequest]
    single: list[BatchRequest]
    warm_up: list[BatchRequest]
    temperature: float
    longest: int

    @property
    def output_tokens(self) -> int:
        """Tokens that all requests together generate."""
        return sum(ask.max_tokens for ask in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(len(ask.prompt) for ask in self.requests)


@dataclass(frozen=True)
class BatchLoad:
    """The load: lengths and tokens are drawn uniformly; equal seeds give equal requests.

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

    def job(self, vocab_size: int) -> BatchJob:
        """Return the requests for a model, without the ends of the vocabulary, where special tokens are."""
        source = random.Random(f"batch {self.seed}")
        tokens = range(vocab_size // 8, max(vocab_size * 7 // 8, vocab_size // 8 + 1))

        def ask(prompt: int, output: int) -> BatchRequest:
            return BatchRequest(source.choices(tokens, k=prompt), output)

        return BatchJob(
            [
                ask(self.prompt_tokens.draw(source), self.output_tokens.draw(source))
                for _ in range(self.requests)
            ],
            [ask(SINGLE_PROMPT, 1), ask(SINGLE_PROMPT, self.single_tokens)],
            [ask(SINGLE_PROMPT, WARM_UP_TOKENS) for _ in range(min(self.requests, WARM_UP_REQUESTS))],
            self.temperature,
            self.longest,
        )


def vocab_size(folder: Path) -> int:
    """Return the size of a model's vocabulary.

    Raises:
        UsageError: the model's config.json has none.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if not isinstance(size := config.get("vocab_size"), int):
        raise UsageError(f"{folder / 'config.json'} names no vocab_size")
    return size


def least_seconds(job: BatchJob, shape: ModelShape, limits: Limits, weight_bits: float) -> float:
    """Return the roofline in seconds: no engine on this device finishes all requests earlier.

    With all of them in one batch, each step reads the weights once, so they are read as often as the
    longest output has tokens; the token after ``n`` others of its sequence reads the KV of ``n``. Each token
    of prompts and outputs costs two operations per weight.
    """
    weights = shape.parameters * weight_bits / 8 * max(ask.max_tokens for ask in job.requests)
    read = sum(len(ask.prompt) + past for ask in job.requests for past in range(1, ask.max_tokens))
    operations = 2 * shape.parameters * (job.prompt_tokens + job.output_tokens)
    return max((weights + read * shape.kv_bytes) / limits.bandwidth, operations / limits.arithmetic)
