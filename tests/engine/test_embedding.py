"""Vectors of prompts: their length, how many prompts are in the engine, and prompts that were given up."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import trio

from ullm.config import EngineConfig
from ullm.engine.embedding import AT_ONCE, at_once, embed_all, unit
from ullm.errors import EngineStopped


class StubGeneration:
    """Takes a step's time; its vector is the prompt."""

    def __init__(self, engine: StubEngine, prompt: Sequence[int]) -> None:
        self._engine = engine
        self.embedding = array("f", prompt)

    async def __aenter__(self) -> StubGeneration:
        self._engine.running += 1
        self._engine.most = max(self._engine.most, self._engine.running)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._engine.running -= 1

    def __aiter__(self) -> StubGeneration:
        return self

    async def __anext__(self) -> object:
        await trio.sleep(1)
        raise StopAsyncIteration


class StubEngine:
    """Counts what runs at the same time."""

    def __init__(self, **options: Any) -> None:
        self.config = EngineConfig(model="stub", **options)
        self.running = self.most = 0

    def generate(self, prompt: Sequence[int], params: Any) -> StubGeneration:
        assert (params.pooling, params.max_tokens) == ("mean", 1)
        return StubGeneration(self, prompt)


def test_unit() -> None:
    assert unit(array("f", [3, 4])).tolist() == pytest.approx([0.6, 0.8])
    assert math.isclose(math.hypot(*unit(array("f", [1e-30, 1e-30]))), 1, rel_tol=1e-6)
    assert unit(array("f", [0, 0])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, AT_ONCE), ({"max_bs": 2, "max_queue": 1}, 3), ({"max_bs": 1, "max_queue": 1, "replicas": 2}, 3)],
    ids=str,
)
async def test_no_more_prompts_than_there_is_room_for(
    autojump_clock: Any, options: dict[str, int], most: int
) -> None:
    engine = StubEngine(**options)
    assert at_once(engine.config) == most
    prompts = [[number, 1] for number in range(3 * AT_ONCE)]
    found = await embed_all(engine, prompts, "mean", normalize=False)  # type: ignore[arg-type]
    assert found == prompts
    assert engine.most == most


async def test_a_prompt_that_was_given_up_has_no_vector(autojump_clock: Any) -> None:
    with pytest.RaisesGroup(EngineStopped):
        await embed_all(StubEngine(), [[1], []], "mean", normalize=True)  # type: ignore[arg-type]
