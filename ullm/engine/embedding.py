"""Vectors of prompts: the hidden states that a model has pooled, as programs and servers show them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from ullm.config import EngineConfig
from ullm.errors import EngineStopped
from ullm.sampling import SamplingParams

if TYPE_CHECKING:
    from ullm.engine.engine import Engine

AT_ONCE = 64
"""Most prompts of one caller that are in the engine at the same time."""


def at_once(config: EngineConfig) -> int:
    """Return how many prompts of one caller may be in the engine, which refuses more than it has room for."""
    return min(AT_ONCE, (config.max_bs or AT_ONCE) * config.replicas + config.max_queue)


def unit(vector: array[float]) -> array[float]:
    """Return a vector of length 1 in the same direction; one of length 0 stays as it is."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    return array("f", (value / length for value in vector)) if length else vector


async def embed_all(
    engine: Engine, prompts: Sequence[Sequence[int] | str], pooling: str, *, normalize: bool
) -> list[list[float]]:
    """Return one vector per prompt, in order.

    Args:
        pooling: ``mean`` or ``last``; see `SamplingParams`.
        normalize: make each of length 1.

    Raises:
        RequestError: a prompt is invalid, or the model has no hidden states.
        EngineStopped: the engine has ended a prompt before it was computed.
    """
    params = replace(SamplingParams(), pooling=pooling)
    vectors: list[list[float]] = [[] for _ in prompts]
    limit = trio.CapacityLimiter(at_once(engine.config))

    async def embed(index: int) -> None:
        async with limit, engine.generate(prompts[index], params) as generation:
            async for _ in generation:
                pass
        vector = generation.embedding
        if not vector:
            raise EngineStopped
        vectors[index] = (unit(vector) if normalize else vector).tolist()

    async with trio.open_nursery() as nursery:
        for index in range(len(prompts)):
            nursery.start_soon(embed, index)
    return vectors
